"""Who else answers the prompts: the policy as it was, or another model."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.core import InputError, first_line
from hybrid.models import Backbone, Policy, is_adapted
from hybrid.rollout.engine import Engine, RolloutConfig
from hybrid.rollout.torch_engine import TorchEngine

__all__ = ["NamedModel", "PastPolicy"]


class PastPolicy:
    """The policy as it was at the last `take`; before the first one, the policy as it is.

    Holds the weights that are trained, and shares all others with the policy: a copy of the backbone, or of the
    adapter alone. An adapter stands in the policy's own model while it answers, and takes no other memory.
    """

    def __init__(self, policy: Policy, engine: Engine):
        self._policy = policy
        # It answers in one process alone, whose reward asks: it shares no rows with others.
        self._engine = engine if engine.world.size == 1 else TorchEngine(policy, engine.config)
        self._taken: dict[str, Tensor] = {}
        self._other: Engine | None = None  # of the copy, where the whole backbone is trained

    @torch.no_grad()
    def take(self) -> None:
        """Keep the weights as they are now."""
        now = self._trained()
        if self._taken:
            for name, kept in self._taken.items():
                kept.copy_(now[name])
            return
        self._taken = {name: x.clone() for name, x in now.items()}
        if not is_adapted(self._policy.backbone.model):
            self._other = TorchEngine(self._copy(), self._engine.config)

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """What draws its answers; inside the block an adapter stands in the policy."""
        if self._other is not None:
            yield self._other
            return
        now = self._trained() if self._taken else {}
        kept = {name: x.clone() for name, x in now.items()}
        try:
            _put(now, self._taken)
            yield self._engine
        finally:
            _put(now, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that it holds, by their names in the backbone: they themselves, no copies."""
        return dict(self._taken)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up other weights; none: be the policy as it is. Raises ValueError where they are another model's."""
        if not state:
            self._taken, self._other = {}, None
            return
        now = self._trained()
        if {k: x.shape for k, x in now.items()} != {k: x.shape for k, x in state.items()}:
            raise ValueError("the opponent's weights are of another model than the policy, or of other layers")
        if not self._taken:
            self.take()
        for name, kept in self._taken.items():
            if kept.data_ptr() != state[name].data_ptr():
                kept.copy_(state[name])

    def _trained(self) -> dict[str, Tensor]:
        named = self._policy.backbone.named_parameters()
        return {name: x.detach() for name, x in named if x.requires_grad}

    def _copy(self) -> Policy:
        """The policy on the weights that were taken, all others its own."""
        policy = self._policy
        own = {id(x): x for x in (*policy.parameters(), *policy.buffers())}
        own |= {
            id(x): nn.Parameter(self._taken[name], requires_grad=False)
            for name, x in policy.backbone.named_parameters()
            if name in self._taken
        }
        return copy.deepcopy(policy, own).eval()


class NamedModel:
    """Another model, which stays as it is. It must have the tokenizer of the run: both are given the same tokens.

    Raises InputError where there is no such model, or where it has other tokens.
    """

    def __init__(self, name: str, tokenizer: Any, *, device: torch.device, dtype: torch.dtype, config: RolloutConfig):
        backbone = Backbone.from_pretrained(name, dtype=dtype).to(device).requires_grad_(False)
        _check_tokens(name, tokenizer)
        backbone.fit_vocabulary(tokenizer)
        # Its value head is never asked, and its random start must not cost the run a random number.
        with torch.random.fork_rng(devices=[]):
            self._engine = TorchEngine(Policy(backbone).eval(), config)

    def take(self) -> None:
        """Nothing: it is no policy of the run's."""

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """What draws its answers."""
        yield self._engine

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: its folder has it."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError for the state of an opponent that was the policy."""
        if state:
            raise ValueError("the checkpoint's opponent was the policy as it was, and this one is a named model")


@torch.no_grad()
def _put(there: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, x in there.items():
        x.copy_(values[name])


def _check_tokens(name: str, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    # The folder of a model that was made for this tokenizer may have none of its own.
    if Path(name).is_dir() and not any(Path(name).glob("tokenizer*")):
        return
    try:
        own = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"the opponent {name!r} has no tokenizer: {first_line(error)}") from error
    if own.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"the opponent {name!r} has other tokens than the policy ({len(own)}, the run's tokenizer has "
            f"{len(tokenizer)}): both are given the same prompts as tokens; name a model of the policy's family"
        )
