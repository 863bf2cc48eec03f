"""Generalized advantage estimation in one launch: a linear recurrence over each row, solved by a scan.

With `next` the next VALID token and G = A + value (what the value head is trained to),

    A_t = reward_t + gamma value_next - value_t + gamma lam A_next
        = G_t - value_t,   G_t = reward_t + U_next,   U_t = gamma lam G_t + gamma (1 - lam) value_t

U is all that a token hands to the one before it, so it is a recurrence of its own,

    U_t = decay_t U_{t+1} + gain_t   valid:   decay = gamma lam, gain = gamma lam reward_t + gamma (1 - lam) value_t
                                     skipped: decay = 1,         gain = 0

and two such steps are again one: (decay, gain) composes associatively. One program takes a row, from its end
to its start in blocks: a scan over the block's pairs, then U at the block's left edge is carried on.

Memory moved per token, float32: reads reward, value, mask (4 + 4 + 1 bytes), writes advantage and return
(4 + 4): 17 bytes. Each token is loaded a second time, as the next one of its left neighbour, from the cache.
"""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gae"]

# One configuration for every architecture: most rows of a rollout are one block. 1024 tokens over 8 warps are 4 a
# thread; with 4 warps, float64 spilled on sm_80.
BLOCK = 1024
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}  # fusion said aloud: Triton 3.10 changes its default


@triton.jit
def _compose(later_decay, later_gain, decay, gain):
    """First the step of the later tokens, then the one before them."""
    return later_decay * decay, later_gain * decay + gain


# No size, no stride and no input's alignment (a slice may begin anywhere) is specialized: one variant serves all.
SIZES = ["reward_row", "reward_col", "value_row", "value_col", "mask_row", "mask_col", "length"]
INPUTS = ["reward_ptr", "value_ptr", "mask_ptr"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INPUTS)
def gae_kernel(
    reward_ptr,
    value_ptr,
    mask_ptr,
    advantage_ptr,  # (B, T), contiguous
    return_ptr,  # (B, T), contiguous
    reward_row,
    reward_col,
    value_row,
    value_col,
    mask_row,
    mask_col,
    length,
    lam_high,  # gamma lam = high + low
    lam_low,
    rest_high,  # gamma (1 - lam) = high + low
    rest_low,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    reward_ptr += row * reward_row
    value_ptr += row * value_row
    mask_ptr += row * mask_row
    advantage_ptr += row * length
    return_ptr += row * length
    lam_step = tl.full((BLOCK,), lam_high, DTYPE) + tl.full((BLOCK,), lam_low, DTYPE)
    rest_step = tl.full((BLOCK,), rest_high, DTYPE) + tl.full((BLOCK,), rest_low, DTYPE)
    index = tl.arange(0, BLOCK)
    carried = tl.full((), 0.0, DTYPE)  # U past the block's last token
    done = 0
    while done < length:
        # Right to left by the addresses and not by the scan's `reverse`, which was wrong in some versions
        # (triton-lang/triton#4362, #8412).
        at = (length - 1 - done - index).to(tl.int64)
        inside = at >= 0
        valid = inside & (tl.load(mask_ptr + at * mask_col, mask=inside, other=0) != 0)
        reward = tl.load(reward_ptr + at * reward_col, mask=inside, other=0).to(DTYPE)
        value = tl.load(value_ptr + at * value_col, mask=inside, other=0).to(DTYPE)

        after = at + 1
        exists = inside & (after < length)
        steps = exists & (tl.load(mask_ptr + after * mask_col, mask=exists, other=0) != 0)
        after_reward = tl.load(reward_ptr + after * reward_col, mask=exists, other=0).to(DTYPE)
        after_value = tl.load(value_ptr + after * value_col, mask=exists, other=0).to(DTYPE)

        # `where` and not a product: what stands outside the mask may be NaN.
        decay = tl.where(steps, lam_step, 1.0)
        gain = tl.where(steps, lam_step * after_reward + rest_step * after_value, 0.0)
        decay, gain = tl.associative_scan((decay, gain), 0, _compose)
        from_next = decay * carried + gain  # U_{t+1}
        return_ = reward + from_next
        tl.store(advantage_ptr + at, tl.where(valid, return_ - value, 0.0), mask=inside)
        tl.store(return_ptr + at, tl.where(valid, return_, 0.0), mask=inside)
        carried = tl.sum(tl.where(index == BLOCK - 1, from_next, 0.0), 0)
        done += BLOCK


@torch.library.custom_op("hybrid_kernels::gae", mutates_args=())
def _gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    if reward.device.type == "cpu" and isinstance(gae_kernel, triton.JITFunction):
        raise RuntimeError(
            "hybrid_kernels: gae got CPU tensors, and Triton runs on a GPU. Call hybrid.functional.gae, or set "
            "TRITON_INTERPRET=1 before triton is imported to test the kernel"
        )
    advantage, return_ = _empty(reward, value), _empty(reward, value)
    if reward.numel():
        with torch.cuda.device_of(reward):
            gae_kernel[(reward.shape[0],)](
                reward, value, mask, advantage, return_,
                *reward.stride(), *value.stride(), *mask.stride(), reward.shape[1],
                *_halves(gamma * lam), *_halves(gamma * (1.0 - lam)),
                DTYPE=tl.float64 if advantage.dtype == torch.float64 else tl.float32, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return advantage, return_


@_gae.register_fake
def _(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    return _empty(reward, value), _empty(reward, value)


def _halves(number: float) -> tuple[float, float]:
    """number = high + low to 48 bits, each a float32, because no float argument of a kernel is surely wider."""
    high = ctypes.c_float(number).value
    return high, number - high


def _empty(reward: Tensor, value: Tensor) -> Tensor:
    dtype = torch.float64 if torch.float64 in (reward.dtype, value.dtype) else torch.float32
    return torch.empty(reward.shape, dtype=dtype, device=reward.device)


def gae(reward: Tensor, value: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates over the valid tokens of each row; `hybrid.functional.gae` is the definition.

    reward, value: (B, T) float, of any strides.   mask: (B, T), true on the policy's own tokens.
    Returns `(advantage, return_)`, (B, T), 0 outside the mask, without gradient: float64 where reward or value
    is, else float32.
    Raises ValueError if the shapes differ or gamma or lam lies outside [0, 1], TypeError on a DTensor.
    """
    for name, tensor in (("reward", reward), ("value", value), ("mask", mask)):
        if hasattr(tensor, "device_mesh"):
            raise TypeError(f"gae: {name} is a DTensor, and the kernel takes one device's tensors; give its to_local()")
    if reward.dim() != 2 or not reward.shape == value.shape == mask.shape:
        raise ValueError(
            f"gae: shapes must be equal and (B, T), got reward {tuple(reward.shape)}, value {tuple(value.shape)}, "
            f"mask {tuple(mask.shape)}"
        )
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"gae: {name} must lie in [0, 1], got {number}")
    return _gae(reward.detach(), value.detach(), mask.detach(), gamma, lam)
