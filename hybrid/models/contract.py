"""What a model must do for PPO's numbers to be right, tried once on a few tokens when its Backbone is built."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hybrid.core import InputError, first_line, is_out_of_memory
from hybrid.functional import autocast_dtype, soft_capped

__all__ = ["check_contract", "check_packing", "logit_scale", "refusing", "takes_fixed_cache", "windows"]

NUM_TOKENS, NUM_PADDING, NUM_STEPS = 7, 3, 2
# As transformers' configs call the number of tokens that a layer looks back.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")


class Tried(Protocol):
    """What is tried: a `Backbone`, of which this room's checks are a part."""

    @property
    def model(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def head_weight(self) -> Tensor: ...
    @property
    def head_bias(self) -> Tensor | None: ...
    @property
    def softcap(self) -> float | None: ...

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def next_logits(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]: ...


@contextmanager
def refusing(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` is in eval mode, without gradients; what it cannot do is an InputError that names it."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise InputError(
            f"{type(model).__name__} cannot be run as a causal language model: {first_line(error)}"
        ) from error
    finally:
        model.train(was_training)


def logit_scale(backbone: Tried) -> float:
    """The constant factor of the model's own logits over head(trunk(x)), which its config has (Granite); else 1.

    Raises InputError where the two are not proportional, but for a soft-cap (a layer between trunk and head).
    """
    ids = _tokens(backbone, NUM_TOKENS)
    hidden = backbone(ids, torch.ones_like(ids))
    bias, cap = backbone.head_bias, backbone.softcap
    shift = 0.0 if bias is None else bias.float()
    ours = nn.functional.linear(hidden, backbone.head_weight).float()
    theirs = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    # Before the soft-cap and the bias they differ by that factor, if by anything. What the cap has flattened has
    # nothing left to measure it by.
    linear = (theirs if cap is None else cap * torch.atanh((theirs / cap).clamp(-0.999, 0.999))) - shift
    steep = torch.ones_like(ours, dtype=torch.bool) if cap is None else theirs.abs() < 0.7 * cap
    measured = ((ours * linear)[steep].sum() / (ours**2)[steep].sum().clamp(min=1e-30)).item()
    scale = min(_scales(backbone.model.config), key=lambda known: abs(known - measured))
    # Rounding of the stored dtype: bf16 keeps 8 bits, and both sides are rounded, before a soft-cap.
    rounding = 4 * torch.finfo(hidden.dtype).eps
    size = theirs.abs().max() if cap is None else (scale * ours).abs()
    tolerance = rounding * size + 1e-4
    wanted = soft_capped(scale * ours + shift, cap)
    if ((theirs - wanted).abs() > tolerance).any():
        raise InputError(
            f"{type(backbone.model).__name__} computes its logits by more than its LM head on get_decoder()'s output "
            "(another layer); such models are not supported"
        )
    return scale


def _scales(config: Any) -> list[float]:
    """1, and every factor of the logits that the config may mean, or its inverse."""
    values = [
        float(value)
        for name, value in vars(config.get_text_config()).items()
        if ("scal" in name or "multiplier" in name) and isinstance(value, (int, float)) and value > 0
    ]
    return [1.0, *values, *(1 / value for value in values)]


def check_contract(backbone: Tried) -> None:
    """Raise InputError, by the model's name, unless

    a token's hidden state is the same alone, behind padding and before padding;
    steps with the cache give the logits that one forward over all tokens gives, also behind padding.
    """
    name, length = type(backbone.model).__name__, NUM_TOKENS + NUM_PADDING
    full = _tokens(backbone, length)
    ids, padding = full[:, :NUM_TOKENS], torch.zeros_like(full[:, :NUM_PADDING])
    alone = backbone(ids, torch.ones_like(ids))
    rows = torch.cat([torch.cat([padding, ids], 1), torch.cat([ids, padding], 1), full])
    mask = torch.ones_like(rows)
    mask[0, :NUM_PADDING] = 0
    mask[1, NUM_TOKENS:] = 0
    left, right, whole = backbone(rows, mask)
    for side, hidden in (("left", left[NUM_PADDING:]), ("right", right[:NUM_TOKENS])):
        if not _same(hidden, alone[0], alone.dtype):
            raise InputError(
                f"{name} reads the padding: on the {side} of a row it changes what the row's tokens mean, so that "
                "batches of prompts would be wrong; such models are not supported"
            )
    wanted = backbone.logits(torch.stack([left, whole]))
    rows, mask, cache = rows[::2], mask[::2], None
    seen = length - NUM_STEPS
    new = rows[:, :seen]
    for position in range(seen - 1, length):
        logits, cache = backbone.next_logits(new, mask[:, : position + 1], cache)
        if not _same(logits, wanted[:, position], alone.dtype):
            raise InputError(
                f"{name} gives other logits token by token, with its cache, than in one forward: what is sampled "
                "would not be what is trained; such models are not supported"
            )
        new = rows[:, position + 1 : position + 2]


def check_packing(backbone: Tried, max_length: int) -> None:
    """Raise InputError unless packed segments give the hidden states that they have alone.

    The segment that is tried is longer than any window of the model, where rows of `max_length` tokens can be.
    """
    longest = max([NUM_TOKENS, *(window + 2 for window in windows(backbone.model.config))])
    length = max(min(longest, max_length - NUM_PADDING), 2)
    ids = _tokens(backbone, NUM_PADDING + length)
    lengths = torch.tensor([NUM_PADDING, length])
    segments = torch.repeat_interleave(torch.tensor([1, 2]), lengths).unsqueeze(0).to(ids.device)
    places = torch.cat([torch.arange(n) for n in lengths.tolist()]).unsqueeze(0).to(ids.device)
    try:
        with refusing(backbone.model):
            packed = backbone(ids, segments, places)[0, NUM_PADDING:]
            alone = backbone(ids[:, NUM_PADDING:], torch.ones_like(ids[:, NUM_PADDING:]))[0]
            kept_apart = _same(packed, alone, alone.dtype)
    except InputError:  # a model that takes no mask per segment
        kept_apart = False
    if not kept_apart:
        name = type(backbone.model).__name__
        raise InputError(f"{name} cannot keep packed examples apart; set sft.packing to false")


def takes_fixed_cache(backbone: Tried) -> bool:
    """Whether steps with a cache of fixed shape (`fixed_cache`) give what steps with a growing one give.

    Tried behind padding and without any, which are two paths in transformers, and where the model has a window on more
    tokens than that, up to 1024.
    """
    try:
        with refusing(backbone.model):
            return all(_same_with_fixed_cache(backbone, padding) for padding in (NUM_PADDING, 0))
    except InputError:  # a model that wants another kind of cache
        return False


def _same_with_fixed_cache(backbone: Tried, padding: int) -> bool:
    from hybrid.models.cache import fixed_cache  # here: it loads transformers

    seen = min(max([NUM_TOKENS, *(window + 2 for window in windows(backbone.model.config))]), 1024)
    ids = _tokens(backbone, seen)
    mask = torch.ones(1, seen + NUM_STEPS, dtype=torch.bool, device=backbone.device)
    mask[:, :padding] = False
    _, growing = backbone.next_logits(ids, mask[:, :seen])
    fixed = fixed_cache(growing, seen, seen + NUM_STEPS)
    if fixed is None:
        return False
    new, dtype = ids[:, -1:], autocast_dtype(backbone.device) or backbone.head_weight.dtype
    for step in range(NUM_STEPS):
        places = torch.full_like(new, seen - padding + step)
        wanted, growing = backbone.next_logits(new, mask[:, : seen + step + 1], growing, places)
        logits, _ = backbone.next_logits(new, mask, fixed, places)
        if not _same(logits, wanted, dtype):
            return False
    return True


def windows(config: Any) -> list[int]:
    """How many tokens back the layers look that do not see all; none where all do."""
    values = [getattr(config.get_text_config(), name, None) for name in WINDOWS]
    return [value for value in values if isinstance(value, int) and value > 0]


def _tokens(backbone: Tried, length: int) -> Tensor:
    """(1, length) ids, none of them 0, which fills the padding here."""
    ids = torch.arange(length, device=backbone.device) % (backbone.head_weight.shape[0] - 1) + 1
    return ids.unsqueeze(0)


def _same(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors differ by rounding in `dtype` only: over all, as a router near a tie may flip a token."""
    low_precision = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    eps = torch.finfo(torch.bfloat16 if low_precision else dtype).eps
    # 16 roundings; of float32's, which are small, a thousand, so that no deep model is refused for them.
    tolerance = max(16 * eps, 1e-4)
    return bool((ours - theirs).float().norm() <= tolerance * theirs.float().norm())
