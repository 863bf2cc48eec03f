"""Starting the two epilogue kernels on tensors, and what every public function here checks and returns."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from hybrid_kernels.configs import VECTOR, config_for
from hybrid_kernels.epilogue import IGNORE, STATE_ROWS, backward_kernel, forward_kernel

__all__ = [
    "IGNORE",
    "Rows",
    "TokenStats",
    "backward",
    "check",
    "check_labels",
    "forward",
    "new_results",
    "no_second_derivative",
    "wanted",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("logprob", "entropy", "kl")


class TokenStats(NamedTuple):
    """Per token, float32 in the labels' shape: what was wanted, and None for the rest."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None


class Rows(NamedTuple):
    """N = outer * inner rows of logits in memory, no copy: row (i, j) starts at i * outer_stride + j * inner_stride."""

    data: Tensor
    inner: int
    outer_stride: int
    inner_stride: int

    @staticmethod
    def of(logits: Tensor) -> "Rows":
        """The rows of (..., V). A view such as logits[:, :-1] stays one; only stranger strides cost a copy."""
        if logits.stride(-1) != 1 and logits.shape[-1] > 1:
            logits = logits.contiguous()
        if logits.dim() != 3:
            logits = logits.reshape(-1, logits.shape[-1])
            return Rows(logits, max(logits.shape[0], 1), 0, logits.stride(0))
        return Rows(logits, max(logits.shape[1], 1), logits.stride(0), logits.stride(1))

    @property
    def skew(self) -> int:
        """How many elements after an aligned address the first row starts."""
        return self.data.data_ptr() // self.data.element_size() % VECTOR

    @property
    def strides(self) -> tuple[int, int]:
        return self.outer_stride, self.inner_stride


def new_results(labels: Tensor, entropy: bool, kl: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, kl in the labels' shape (empty where not asked for) and the kernels' state (7, N)."""
    options: dict = {"dtype": torch.float32, "device": labels.device}
    logprob = torch.empty(labels.shape, **options)
    entropy_out, kl_out = (torch.empty(labels.shape if asked else (0,), **options) for asked in (entropy, kl))
    # Zeros, for the kernels leave ignored rows and statistics that are not asked for alone.
    return logprob, entropy_out, kl_out, torch.zeros((STATE_ROWS, labels.numel()), **options)


def forward(
    rows: Rows,
    ref: Rows | None,
    labels: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    columns: slice,
    total_columns: int,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> None:
    """Run forward_kernel over the vocabulary slice `columns`, which is all that `rows` and `ref` hold."""
    if not labels.numel():
        return
    logprob, entropy_out, kl_out, state = results
    config = config_for("forward", columns.stop - columns.start, labels.device)
    other = rows if ref is None else ref
    with _device(labels):
        forward_kernel[(labels.numel(),)](
            rows.data, other.data, _at(bias, columns, rows), _at(ref_bias, columns, rows), labels, state,
            logprob, entropy_out, kl_out, labels.numel(), columns.stop - columns.start, columns.start, total_columns,
            rows.inner, rows.skew, *rows.strides, *other.strides, float(temperature), float(softcap or 0.0),
            ENTROPY=entropy, KL=ref is not None, SOFTCAP=softcap is not None,
            BIAS=bias is not None, REF_BIAS=ref_bias is not None, ALIGN=_alignment(rows, other),
            LANES=config.lanes, WIDTH=config.width, num_warps=config.num_warps,
        )  # fmt: skip


def backward(
    grads: Sequence[Tensor | None],
    rows: Rows,
    ref: Rows | None,
    labels: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    *,
    columns: slice,
    temperature: float,
    softcap: float | None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> None:
    """Write d loss / d logits of the slice into out (N, columns), whose rows may be further apart than that."""
    if not labels.numel():
        return
    _, entropy, kl, state = results
    g_logprob, g_entropy, g_kl = grads
    ref = None if g_kl is None else ref
    config = config_for("backward", columns.stop - columns.start, labels.device)
    other = rows if ref is None else ref
    with _device(labels):
        backward_kernel[(labels.numel(),)](
            rows.data, other.data, _at(bias, columns, rows), _at(ref_bias, columns, rows), labels, state, entropy, kl,
            *(state if g is None else g for g in grads), out,
            labels.numel(), columns.stop - columns.start, columns.start, rows.inner, rows.skew,
            *rows.strides, *other.strides, out.stride(0), float(temperature), float(softcap or 0.0),
            LOGPROB=g_logprob is not None, ENTROPY=g_entropy is not None, KL=g_kl is not None,
            SOFTCAP=softcap is not None, BIAS=bias is not None, REF_BIAS=ref_bias is not None,
            ALIGN=_alignment(rows, other, Rows(out, rows.inner, rows.inner * out.stride(0), out.stride(0))),
            LANES=config.lanes, WIDTH=config.width, num_warps=config.num_warps,
        )  # fmt: skip


def _alignment(rows: Rows, *others: Rows) -> int:
    """VECTOR where every row of all tensors starts at the same place in memory modulo VECTOR elements, else 1."""
    same = all(
        (other.outer_stride - rows.outer_stride) % VECTOR == 0
        and (other.inner_stride - rows.inner_stride) % VECTOR == 0
        and other.skew == rows.skew
        for other in others
    )
    return VECTOR if same else 1


def _at(bias: Tensor | None, columns: slice, rows: Rows) -> Tensor:
    """The slice's bias; where there is none, any pointer, which is not read."""
    return rows.data if bias is None else bias[columns].contiguous()


def _device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return nullcontext() if x.device.type == "cpu" else torch.cuda.device(x.device)


def wanted(want: Sequence[str], results: Sequence[Tensor]) -> TokenStats:
    return TokenStats(**{name: x for name, x in zip(NAMES, results, strict=True) if name in want})


def check(
    function: str,
    tensors: dict[str, Tensor | None],
    labels: Tensor,
    temperature: float,
    softcap: float | None,
    want: Sequence[str],
) -> None:
    """What all public functions refuse. `tensors` are the floating-point inputs by name."""
    if not want or set(want) - set(NAMES):
        raise ValueError(f"{function}: want must be some of {', '.join(NAMES)}, got {tuple(want)}")
    if not temperature > 0:
        raise ValueError(f"{function}: temperature must be > 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{function}: softcap must be > 0 or None, got {softcap}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{function}: labels must be int32 or int64, got {labels.dtype}")
    for name, x in {"labels": labels, **tensors}.items():
        if x is None:
            continue
        # By name, for importing torch.distributed.tensor takes longer than the rest of this package.
        if type(x).__name__ == "DTensor":
            raise TypeError(f"{function}: {name} is a DTensor; gather it with .full_tensor(), or pass .to_local()")
        if x.device != labels.device:
            raise ValueError(f"{function}: {name} is on {x.device} and labels on {labels.device}")
        if name != "labels" and x.dtype not in DTYPES:
            raise ValueError(
                f"{function}: {name} is {x.dtype}; the kernels take float32, bfloat16 and float16. "
                "The torch definition in hybrid.functional takes every floating dtype"
            )


def check_labels(function: str, labels: Tensor, total_columns: int) -> None:
    """On the CPU, where it costs no synchronisation. On a GPU TRITON_DEBUG=1 checks them in the kernel."""
    if labels.device.type == "cpu" and bool(((labels != IGNORE) & ((labels < 0) | (labels >= total_columns))).any()):
        raise ValueError(f"{function}: labels must lie in [0, {total_columns}) or be -100")


def no_second_derivative(function: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{function}: gradients flow once; create_graph=True is not supported")
