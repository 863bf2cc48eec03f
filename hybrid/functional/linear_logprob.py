"""Log-probability, entropy and exact KL from hidden states, without ever holding the logits.

The head's product is taken one (rows x vocabulary slice) tile at a time. Forward keeps, for each token and slice,
the maximum and the sums relative to it, and joins the slices at the end; backward takes the product again, tile by
tile, but for those whose logits found room. Memory is a few tiles, that room and the statistics instead of N x V,
for up to one more product of 2 N V D operations.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid.functional.logprob import IGNORE, TokenStats, check_scale, check_want
from hybrid.functional.precision import autocast_dtype, check_same_shape, float_dtype, rounded_operands

__all__ = ["linear_logprob"]

# Columns and rows of a tile, 16 MiB in float32: smaller ones stay in a core's own cache but start many more parallel
# regions, each of which waits for both threads (benchmarks/NOTES.md).
_VOCAB_SLICE = 2048
_ROW_CHUNK = 2048
# Bytes of tiles that forward may keep for backward at least, beside the memory of the weight's gradient.
_SPARE = 64 * 2**20


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    want: Collection[str] = ("logprob",),
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    keep_bytes: int = 0,
) -> TokenStats:
    """`token_stats` of the logits hidden @ weight.T + bias.

    hidden: (..., D).   weight: (V, D).   bias: (V,).   labels: (...) int32 or int64, the token that hidden[t] predicts;
        rows whose label is IGNORE are left out: they give 0, have no gradient and may hold anything, NaN too.
    want: any of "logprob", "entropy", "kl". "kl" is KL(policy || reference) and needs ref_hidden (..., D')
        and ref_weight (V, D'); the reference gets no gradient.
    keep_bytes: what the logits may take that are kept for the backward pass, if there will be one; it takes the others'
        product again.
    Products and statistics are float32 (float64 where an input is). Under autocast the operands of the products,
        forward and backward, may be rounded to its dtype (`rounded_operands`); they are added in float32 all the same.
    Gradients flow to hidden, weight and bias, once: create_graph=True raises RuntimeError.
    Raises ValueError on shapes that do not fit, a label outside the vocabulary (checked on the CPU, where
    it costs no synchronisation), or a `want` that is not known.
    """
    check_scale(temperature, softcap)
    check_want("linear_logprob", want, ref_hidden=ref_hidden, ref_weight=ref_weight)
    _check_shapes(hidden, weight, labels, bias, want, ref_hidden, ref_weight, ref_bias)
    if keep_bytes < 0:
        raise ValueError(f"linear_logprob: keep_bytes must be at least 0, got {keep_bytes}")
    rows = (labels.reshape(-1) != IGNORE).nonzero().squeeze(1)  # (N,): the valid tokens
    picked = labels.reshape(-1)[rows].long()
    if labels.device.type == "cpu" and len(picked) and not (picked.min() >= 0 and picked.max() < weight.shape[0]):
        raise ValueError(
            f"linear_logprob: labels must lie in [0, {weight.shape[0]}), got {picked.min()} to {picked.max()}"
        )
    reference: tuple[Tensor | None, ...] = ()
    if "kl" in want:
        assert ref_hidden is not None and ref_weight is not None
        reference = (_packed(ref_hidden.detach(), rows), ref_weight.detach(), _detached(ref_bias))
    scale, operands = (softcap, float(temperature)), autocast_dtype(hidden.device)
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    spare = max(_SPARE, keep_bytes) if trained else None
    outputs = _LinearLogprob.apply(
        _packed(hidden, rows), weight, bias, picked, scale, operands, tuple(want), spare, *reference
    )
    return TokenStats(
        **{
            name: out.new_zeros(labels.numel()).index_put((rows,), out).view(labels.shape)
            for name, out in zip(want, outputs, strict=True)
        }
    )


def _check_shapes(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    want: Collection[str],
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> None:
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"linear_logprob: hidden {tuple(hidden.shape)} does not fit labels {tuple(labels.shape)} "
            f"and weight {tuple(weight.shape)}"
        )
    if "kl" in want and ref_hidden is not None and ref_weight is not None:
        check_same_shape(labels=labels, **{"ref_hidden[..., 0]": ref_hidden[..., 0]})
        if ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(f"linear_logprob: the vocabularies differ, {weight.shape[0]} and {ref_weight.shape[0]}")
        if ref_hidden.shape[-1] != ref_weight.shape[-1]:
            raise ValueError(
                f"linear_logprob: ref_hidden {tuple(ref_hidden.shape)} does not fit "
                f"ref_weight {tuple(ref_weight.shape)}"
            )
    for name, b, w in (("bias", bias, weight), ("ref_bias", ref_bias, ref_weight)):
        if b is not None and w is not None and b.shape != w.shape[:1]:
            raise ValueError(f"linear_logprob: {name} {tuple(b.shape)} does not fit its weight {tuple(w.shape)}")


def _packed(hidden: Tensor, rows: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


class _Head:
    """The logits of one model (hidden, weight, bias) tile by tile, each in the memory of the one before."""

    def __init__(self, model: Sequence[Any], scale: tuple[float | None, float], dtype: torch.dtype):
        hidden, self.weight, self.bias = model
        self.softcap, self.temperature = scale
        self.hidden = hidden.to(dtype)
        self.rows = list(_slices(hidden.shape[0], _ROW_CHUNK))
        self.cols = list(_slices(self.weight.shape[0], _VOCAB_SLICE))
        self.tile = self.new_tile()
        self.kept: dict[tuple[int, int], Tensor] = {}  # logits by the tile's first row and column
        self.dweight: Tensor | None = None
        self.spare, self.free = 0, self.hidden.new_empty(0)  # bytes, and memory, that kept logits may still take

    def keep(self, spare: int) -> None:
        """Keep the logits of the first tiles from now on, so that backward need not compute them again.

        Before memory of their own they get that of the weight's gradient, as long as it is empty. Backward writes
        that slice after slice from its start; so they stand at its end, in the order in which they will be read, and
        are so few that each is read before its place is written.
        """
        self.spare = spare
        if self.weight.requires_grad and self.weight.dtype == self.hidden.dtype and self.rows:
            self.dweight = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
            num, width = self.dweight.numel(), self.cols[0].stop
            of_gradient, of_logits = width * self.hidden.shape[1], width * self.hidden.shape[0]
            # The first slice's logits must lie behind the first slice of the gradient, the last kept one's behind
            # its own; those between do then.
            slices = max(0, min((num - of_gradient) // of_logits, (num - of_logits) // of_gradient))
            self.free = self.dweight.view(-1)[num - slices * of_logits :]

    def new_tile(self) -> Tensor:
        return self.hidden.new_empty(min(self.hidden.shape[0], _ROW_CHUNK) * min(self.weight.shape[0], _VOCAB_SLICE))

    def columns(self, cols: slice) -> Tensor:
        """Weights of a vocabulary slice, in the dtype of the computation."""
        return self.weight[cols].to(self.hidden.dtype)

    def logits(self, rows: slice, cols: slice, weight: Tensor) -> Tensor:
        """(n, v), the caller's to write into until the next call.   weight: `columns(cols)`."""
        key, hidden = (rows.start, cols.start), self.hidden[rows]
        z = _first(self.tile, hidden.shape[0], weight.shape[0])
        if key in self.kept:
            return z.copy_(self.kept[key])
        if self.bias is None:
            torch.mm(hidden, weight.T, out=z)
        else:
            torch.addmm(self.bias[cols].to(z.dtype), hidden, weight.T, out=z)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z.div_(self.temperature)
        if len(self.free) >= z.numel():
            self.kept[key] = _first(self.free, *z.shape).copy_(z)
            self.free = self.free[z.numel() :]
        elif self.spare >= z.nbytes:
            self.kept[key] = z.clone()
            self.spare -= z.nbytes
        return z

    def slope(self, z: Tensor) -> Tensor | float | None:
        """d z / d product at the logits z, None for 1: z T / c is the tanh, whose derivative is 1 - tanh^2."""
        if self.softcap is None:
            return None if self.temperature == 1.0 else 1.0 / self.temperature
        return (z * (self.temperature / self.softcap)).square_().neg_().add_(1.0).div_(self.temperature)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _first(tile: Tensor, *shape: int) -> Tensor:
    """The first numbers of a tile's memory, as a contiguous tensor of a shape that fits into it."""
    return tile[: math.prod(shape)].view(shape)


class _LinearLogprob(torch.autograd.Function):
    """hidden: (N, D), labels: (N,), every label a token. Returns (N,) for each name in `want`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: tuple[float | None, float],
        operands: torch.dtype | None,
        want: tuple[str, ...],
        spare: int | None,
        *reference: Tensor | None,
    ) -> tuple[Tensor, ...]:
        dtype = float_dtype(*(x for x in (hidden, weight, bias, *reference) if x is not None))
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False), rounded_operands(operands):
            policy = _Head((hidden, weight, bias), scale, dtype)
            if spare is not None:
                policy.keep(spare)
            ref = _Head(reference, scale, dtype) if reference else None
            stats = _forward(policy, ref, labels, entropy="entropy" in want)
        ctx.save_for_backward(hidden, weight, bias, labels, *reference, *stats.values())
        ctx.names, ctx.want, ctx.scale, ctx.dtype, ctx.operands = tuple(stats), want, scale, dtype, operands
        ctx.kept, ctx.dweight = policy.kept, policy.dweight
        return tuple(stats[name] for name in want)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # once_differentiable would let a second derivative through, as zero, where `grads` are constants.
        if torch.is_grad_enabled():
            raise RuntimeError("linear_logprob: gradients flow once; create_graph=True is not supported")
        hidden, weight, bias, labels, *others = ctx.saved_tensors
        stats = dict(zip(ctx.names, others[-len(ctx.names) :], strict=True))
        reference = others[: -len(ctx.names)]
        # Only once: the first backward overwrites them, a second one (retain_graph) computes all anew.
        kept, dweight = ctx.kept, ctx.dweight
        ctx.kept, ctx.dweight = {}, None
        with torch.autocast(hidden.device.type, enabled=False), rounded_operands(ctx.operands):
            policy = _Head((hidden, weight, bias), ctx.scale, ctx.dtype)
            policy.kept = kept
            ref = _Head(reference, ctx.scale, ctx.dtype) if reference else None
            given = {name: grad for name, grad in zip(ctx.want, grads, strict=True) if grad is not None}
            of_inputs = _backward(policy, ref, labels, stats, given, ctx.needs_input_grad[:3], dweight)
        return (*of_inputs, *[None] * (5 + len(reference)))


class _Partition:
    """Each row's log-partition, m + log s with s = sum exp(z - m), gathered from the slices of the vocabulary."""

    def __init__(self, head: _Head):
        # One row per slice: its maximum, -inf where all of it is, and sum exp(z - maximum).
        self.top = head.hidden.new_empty(len(head.cols), head.hidden.shape[0])
        self.sum = torch.empty_like(self.top)

    def lower_(self, j: int, rows: slice, z: Tensor) -> Tensor:
        """z minus the maximum of each row of this tile, in place."""
        self.top[j, rows] = torch.amax(z, 1)
        # A row of -inf alone stays as it is: -inf - -inf would be NaN.
        return z.sub_(_finite(self.top[j, rows]).unsqueeze(1))

    def join(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """m and s, (N,); the factor that makes a slice's sums relative to m, and what is to be added to a slice's
        z - maximum to make it z - m, (slices, N)."""
        m = self.top.amax(0)
        factor = (self.top - m).exp_()
        return m, (factor * self.sum).sum(0), factor, _finite(self.top) - m


def _forward(policy: _Head, ref: _Head | None, labels: Tensor, *, entropy: bool) -> dict[str, Tensor]:
    """Every statistic by name. A tile's sums are relative to its own maxima, so that large logits cost no digits."""
    partition, ref_partition = _Partition(policy), None if ref is None else _Partition(ref)
    label_logit = policy.hidden.new_zeros(len(labels))
    depth_sum = torch.empty_like(partition.top)  # sum exp(depth) depth, with depth = z - maximum
    gap_sum = torch.empty_like(partition.top)  # sum exp(depth) (ref_depth - depth)
    scratch = policy.new_tile() if entropy or ref is not None else None
    for j, cols in enumerate(policy.cols):
        columns, ref_columns = policy.columns(cols), None if ref is None else ref.columns(cols)
        for rows in policy.rows:
            z = policy.logits(rows, cols, columns)
            inside, index = _inside(labels[rows], cols)
            label_logit[rows] = torch.where(inside, z.gather(1, index).squeeze(1), label_logit[rows])
            depth = partition.lower_(j, rows, z)
            p = _exp(depth, scratch)
            partition.sum[j, rows] = p.sum(1)
            if ref is not None and ref_partition is not None and ref_columns is not None:
                ref_depth = ref_partition.lower_(j, rows, ref.logits(rows, cols, ref_columns))
                ref_partition.sum[j, rows] = ref_depth.exp().sum(1)
                gap_sum[j, rows] = ref_depth.sub_(depth).masked_fill_(p == 0, 0.0).mul_(p).sum(1)
            if entropy:
                depth_sum[j, rows] = p.mul_(_bounded_(depth)).sum(1)
    m, s, factor, shift = partition.join()
    # m and log s stay apart: their sum would lose digits to large logits.
    stats = {"m": m, "log_s": s.log(), "logprob": (label_logit - m) - s.log()}
    if entropy:
        stats["entropy"] = s.log() - (factor * (depth_sum + shift * partition.sum)).sum(0) / s
    if ref_partition is not None:
        stats["ref_m"], ref_s, _, ref_shift = ref_partition.join()
        stats["ref_log_s"] = ref_s.log()
        gap = (factor * (gap_sum + (ref_shift - shift) * partition.sum)).masked_fill_(factor == 0, 0.0)
        stats["kl"] = (ref_s.log() - s.log()) - gap.sum(0) / s
    return stats


def _backward(
    policy: _Head,
    ref: _Head | None,
    labels: Tensor,
    stats: dict[str, Tensor],
    grads: dict[str, Tensor],
    needs: Sequence[bool],
    dweight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """With p = softmax(z) and the gradients g of the three outputs,

    dz = g_logprob (1[label] - p) - g_entropy p (log p + H) + g_kl p (log p - log q - KL)

    dweight: empty memory for that gradient, where forward made some.
    """
    hidden, dtype = policy.hidden, policy.hidden.dtype
    # Without a row nothing below is written.
    new = torch.empty_like if policy.rows else torch.zeros_like
    dhidden = torch.zeros_like(hidden) if needs[0] else None
    if dweight is None or not needs[1]:
        dweight = new(policy.weight) if needs[1] else None
    dbias = new(policy.bias) if needs[2] else None
    scratch = policy.new_tile() if grads.keys() - {"logprob"} else None
    for cols in policy.cols:
        weight, ref_weight = policy.columns(cols), None if ref is None else ref.columns(cols)
        # Sums over all rows in the dtype of the computation; views of the whole where that is its dtype.
        dw = None if dweight is None else dweight[cols].to(dtype)
        db = None if dbias is None else dbias[cols].to(dtype)
        for rows in policy.rows:
            at = {name: value[rows].unsqueeze(1) for name, value in stats.items()}
            g = {name: grad[rows].unsqueeze(1) for name, grad in grads.items()}
            z = policy.logits(rows, cols, weight)
            slope = policy.slope(z)
            logp = z.sub_(at["m"]).sub_(at["log_s"])
            p = _exp(logp, scratch)
            dz_p = -g["logprob"] if "logprob" in g else torch.zeros_like(at["m"])  # what stands behind p in dz
            if "kl" in g and ref is not None and ref_weight is not None:
                logq = ref.logits(rows, cols, ref_weight).sub_(at["ref_m"]).sub_(at["ref_log_s"])
                gap = logq.sub_(logp).masked_fill_(p == 0, 0.0)
                dz_p = dz_p - gap.add_(at["kl"]).mul_(g["kl"])
            if "entropy" in g:
                dz_p = dz_p - _bounded_(logp).add_(at["entropy"]).mul_(g["entropy"])
            dz = p.mul_(dz_p)
            if "logprob" in g:
                inside, index = _inside(labels[rows], cols)
                dz.scatter_add_(1, index, g["logprob"] * inside.unsqueeze(1))
            if slope is not None:
                dz.mul_(slope)
            more = float(rows.start > 0)  # 0 overwrites what an empty tensor held
            if dhidden is not None:
                dhidden[rows].addmm_(dz, weight)
            if dw is not None:
                dw.addmm_(dz.T, hidden[rows], beta=more)
            if db is not None:
                torch.add(dz.sum(0), db if more else 0.0, out=db)
        for whole, part in ((dweight, dw), (dbias, db)):
            if whole is not None and part is not None and whole.dtype != dtype:
                whole[cols] = part
    return dhidden, dweight, dbias


def _inside(labels: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """Whether each label lies in the vocabulary slice, (n,), and its column there, (n, 1), 0 where not."""
    inside = (labels >= cols.start) & (labels < cols.stop)
    return inside, (labels - cols.start).masked_fill(~inside, 0).unsqueeze(1)


def _exp(x: Tensor, scratch: Tensor | None) -> Tensor:
    """exp(x) in the scratch tile, in place where there is none."""
    return torch.exp(x, out=x if scratch is None else _first(scratch, *x.shape))


def _bounded_(x: Tensor) -> Tensor:
    """x in place, finite where exp(x) is 0 (in float64 below -745), so that exp(x) x and its gradient are 0 there."""
    return x.clamp_(min=-1e4)


def _finite(top: Tensor) -> Tensor:
    return top.masked_fill(top == -torch.inf, 0.0)
