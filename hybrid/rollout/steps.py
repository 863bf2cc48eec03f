"""Responses under way: what one token changes, as it is or captured as a CUDA graph."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hybrid.core import first_line
from hybrid.functional import autocast_dtype
from hybrid.models import Backbone, takes_fixed_cache
from hybrid.rollout.draw import draw
from hybrid.rollout.sampling import SamplingConfig

__all__ = ["Decoding", "EagerSteps", "Ends", "FixedSteps", "Graphs", "Speaker", "Steps", "uniforms"]

# A captured graph serves all prompts whose tokens and responses fit into its room, a multiple of this.
BUCKET = 64


class Ends(NamedTuple):
    """eos_ids: any of these ends a response.   pad_id: what fills the rows that have ended."""

    eos_ids: Sequence[int]
    pad_id: int


class Decoding:
    """B responses of up to N tokens, in tensors that stay where they are; `take` adds one token to each.

    mask: (B, room) bool, true on what a next token may see, written or not yet.   new: (B, 1), the tokens that came
    last.   position_ids: (B, 1), theirs.   count: (), how many came.
    ids, taken, logprob: (B, N), as in `Responses`.   running: (B,), whether a row goes on.
    begun: (B, 1), tokens that a response had before.
    last_position: (B, 1), that of the last token that a response has room for; what is drawn past it stays there.
    broken_at: (), the first token whose logits were not finite; N: none.
    """

    def __init__(self, how: SamplingConfig, ends: Ends, num_rows: int, room: int, device: torch.device):
        self.how, self.pad_id, length = how, ends.pad_id, how.max_new_tokens
        self.eos = torch.tensor(sorted(set(ends.eos_ids)), dtype=torch.long, device=device)
        self.mask = torch.ones(num_rows, room, dtype=torch.bool, device=device)
        self.new = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.position_ids = torch.zeros_like(self.new)
        self.last_position = torch.zeros_like(self.new)
        self.count = torch.zeros((), dtype=torch.long, device=device)
        self.broken_at = torch.zeros_like(self.count)
        self.begun = torch.zeros_like(self.new)
        self.ids = torch.zeros(num_rows, length, dtype=torch.long, device=device)
        self.taken = torch.zeros_like(self.ids, dtype=torch.bool)
        self.logprob = torch.zeros(num_rows, length, device=device)
        self.running = torch.ones(num_rows, dtype=torch.bool, device=device)
        self.uniform = torch.zeros(length, num_rows, dtype=_exact(device), device=device)

    def begin(
        self,
        prompt_mask: Tensor,
        generator: torch.Generator | None,
        begun: Tensor | None = None,
        uniform: Tensor | None = None,
    ) -> None:
        """Start anew behind prompts, (B, P), with all the random numbers that their responses can need.

        uniform: (N, B) these numbers; None: from the generator.
        begun: (B,), how many tokens of a response stand at the prompt's end already; None: none.
        """
        self.mask.fill_(True)[:, : prompt_mask.shape[1]] = prompt_mask
        self.position_ids.copy_(prompt_mask.sum(1, keepdim=True) - 1)
        self.count.zero_()
        self.begun.zero_() if begun is None else self.begun.copy_(begun.unsqueeze(1))
        self.last_position.copy_(self.position_ids + self.how.max_new_tokens - self.begun)
        self.broken_at.fill_(self.how.max_new_tokens)
        self.ids.fill_(self.pad_id)
        self.taken.zero_()
        self.logprob.zero_()
        self.running.fill_(True)
        if uniform is not None:
            self.uniform.copy_(uniform)
        elif self.how.temperature:
            torch.rand(self.uniform.shape, generator=generator, out=self.uniform)

    def take(self, logits: Tensor) -> None:
        """Draw a token for each row, (B, V), which may be written into. Reads nothing to the host.

        A row that has ended goes on with padding: nothing reads what it computes.
        """
        how, at = self.how, self.count.view(1)
        finite = logits.amax(-1).isfinite().all()  # the maximum is NaN where a logit is
        torch.where(finite, self.broken_at, torch.minimum(self.broken_at, self.count), out=self.broken_at)
        if how.min_new_tokens:
            too_early = self.begun + self.count < how.min_new_tokens
            logits[:, self.eos] = torch.where(too_early, -torch.inf, logits[:, self.eos])
        token, logprob = draw(
            logits, self.uniform.index_select(0, at).squeeze(0),
            temperature=how.temperature, top_k=how.top_k, top_p=how.top_p,
        )  # fmt: skip
        token = torch.where(self.running, token, self.pad_id)
        self.ids.index_copy_(1, at, token.unsqueeze(1))
        self.taken.index_copy_(1, at, self.running.unsqueeze(1))
        self.logprob.index_copy_(1, at, torch.where(self.running, logprob, 0.0).unsqueeze(1))
        self.running &= ~(token.unsqueeze(1) == self.eos).any(1)
        self.new.copy_(token.unsqueeze(1))
        torch.minimum(self.position_ids + 1, self.last_position, out=self.position_ids)
        self.count += 1


def uniforms(how: SamplingConfig, num_rows: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(N, num_rows): all the random numbers that so many responses can need, as `Decoding.begin` draws them."""
    drawn = torch.zeros(how.max_new_tokens, num_rows, dtype=_exact(device), device=device)
    return torch.rand(drawn.shape, generator=generator, out=drawn) if how.temperature else drawn


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # it has no other


class Steps(Protocol):
    """Responses under way: a call is one token more for each."""

    state: Decoding

    def __call__(self) -> None: ...


class Speaker(Protocol):
    """What says the logits of the next token, as a `Backbone` does."""

    def next_logits(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]: ...


class EagerSteps:
    """A call is one token more, by a cache that grows."""

    def __init__(self, backbone: Speaker, state: Decoding, cache: Any, seen: int):
        self.backbone, self.state, self.cache, self.seen = backbone, state, cache, seen

    def __call__(self) -> None:
        self.seen += 1
        mask = self.state.mask[:, : self.seen]
        logits, self.cache = self.backbone.next_logits(self.state.new, mask, self.cache, self.state.position_ids)
        self.state.take(logits)


class FixedSteps:
    """A call is one token more, by a cache of fixed shape; from the second on a replayed graph where `captures`.

    compiles: have torch.compile make the step, which takes half a minute.
    """

    def __init__(self, backbone: Backbone, state: Decoding, cache: Any, *, captures: bool, compiles: bool):
        self.backbone, self.state, self.cache = backbone, state, cache
        self.captures, self.calls = captures, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self._run: Callable[[], None] = torch.compile(self._step) if compiles else self._step

    def __call__(self) -> None:
        self.calls += 1
        # The first call compiles and allocates what a capture must not.
        if self.graph is None and self.captures and self.calls > 1:
            self.graph = self._captured()
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()

    def _step(self) -> None:
        kind = self.state.new.device.type
        # The casts that autocast keeps are gone when it ends, and a graph would go on reading them.
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            logits, _ = self.backbone.next_logits(
                self.state.new, self.state.mask, self.cache, self.state.position_ids
            )  # fmt: skip
            self.state.take(logits)

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """The step as a graph, which is not run by that; None, with one warning, where it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                self._run()
        except RuntimeError as error:
            self.captures = False
            warnings.warn(
                f"decoding is not captured as a CUDA graph, and slower for it: {first_line(error)}; "
                "rollout.cuda_graphs=false does not try it",
                stacklevel=2,
            )
            return None
        return graph


class Graphs:
    """Fixed steps by their shapes, so that a graph serves many rollouts. Keeps the last few, with their memory.

    captures: False runs the same steps uncaptured, on any device.   compiles: see `FixedSteps`.
    """

    def __init__(self, *, captures: bool = True, compiles: bool = False, keep: int = 4):
        self.captures, self.compiles, self.keep = captures, compiles, keep
        self._known: OrderedDict[Hashable, FixedSteps] = OrderedDict()
        self._fits: bool | None = None  # whether the model gives the same with a cache of fixed shape

    def steps(
        self, backbone: Backbone, how: SamplingConfig, cache: Any, seen: int, repeats: int, num_rows: int, ends: Ends
    ) -> FixedSteps | None:
        """The steps behind prompts of `seen` tokens; None where the model takes no cache of fixed shape.

        cache: the prompts', each of which has `repeats` of the `num_rows` rows.
        """
        from hybrid.models.cache import fixed_cache, rewrite  # here: it loads transformers

        if self._fits is None:
            self._fits = takes_fixed_cache(backbone)
        if not self._fits:
            return None
        room = -(-(seen + how.max_new_tokens) // BUCKET) * BUCKET
        key = _constants(backbone, how, num_rows, room, ends)
        if key in self._known:
            rewrite(self._known[key].cache, cache, seen, repeats)
        else:
            fixed = fixed_cache(cache, seen, room, repeats)
            state = Decoding(how, ends, num_rows, room, backbone.device)
            self._known[key] = FixedSteps(backbone, state, fixed, captures=self.captures, compiles=self.compiles)
        self._known.move_to_end(key)
        while len(self._known) > self.keep:
            self._known.popitem(last=False)
        return self._known[key]


def _constants(backbone: Backbone, how: SamplingConfig, num_rows: int, room: int, ends: Ends) -> Hashable:
    """All that a captured step takes for a constant; of the weights where they lie, for it reads them anew."""
    places = tuple(x.data_ptr() for x in (*backbone.parameters(), *backbone.buffers()))
    return num_rows, room, how, tuple(ends.eos_ids), ends.pad_id, autocast_dtype(backbone.device), places
