"""A loss of the log-probabilities, entropies and KLs, with its gradient taken in the forward pass.

`linear_logprob` takes the head's product again in its backward pass, because a loss may be anything. A loss that is a
sum over tokens, each of its own statistics, with masks and global normalisers known before, needs no second product:

    for a few rows:  logits = hidden @ weight.T;  statistics;  g = d loss / d statistics;  dlogits
    for a group:     dhidden[rows] = dlogits @ weight;  dweight += dlogits.T @ hidden[rows]    in float32

6 N V D operations instead of 8 (8 instead of 12 with a KL; 4 with a frozen head). Bytes per token beside the GEMMs'
operands: 12 V of float32 logits and dlogits (8 V more with a KL), and 12 V D for each group of rows but the first.
Memory: LOGITS_BYTES of logits, GRADIENT_BYTES of dlogits, and dweight in float32 where there are several groups.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.head import WEIGHT_COLUMNS, Head, autocast_dtype, padded, product, slices
from hybrid_kernels.launch import IGNORE, Rows, TokenStats, backward, check_labels, forward, new_results, wanted
from hybrid_kernels.linear_logprob import SLICE_STEP, check_inputs

__all__ = ["linear_logprob_loss"]

# Bytes of the float32 logits of a few rows, and of the dlogits of a group of them, for which dweight is read and
# written once. On an H200 (commit 7022edd, N = 8192), MiB of both and time over that of the three products alone:
#     V = 128256, D = 4096  256, 640 1.45   512, 1280 1.30   1024, 2560 1.16   8192, 8192 1.14
#     V = 151936, D = 3584  256, 640 1.44   512, 1280 1.31   1024, 2560 1.18   8192, 8192 1.12
# What gains is that all rows are one group. With 1024 MiB of logits the second head would take more than 3.2 GiB; 768
# were not measured.
LOGITS_BYTES = 768 * 2**20
GRADIENT_BYTES = 2560 * 2**20
# Rows of a product, where they are many: a usual height of a GEMM's tile.
ROW_STEP = 128

TokenLoss = Callable[[TokenStats, slice], Tensor]


def linear_logprob_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    want: Sequence[str] = ("logprob",),
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> tuple[Tensor, TokenStats]:
    """The sum of token_loss over all tokens, differentiable, and the statistics, detached.

    token_loss(stats, rows) -> (n,): the loss of each of n tokens from `stats`, whose tensors are (n,), for the tokens
        `rows` of labels.flatten(). It is called once for each few rows, so a token's loss must depend on no other
        token: weights, masks and the global count to divide by are its own business, and known before. Ignored
        tokens come with statistics 0 and get no gradient, but the loss it gives them counts.
    The other arguments, and what the products take, are those of `linear_logprob`.
    The gradients are there after the forward pass; backward multiplies them by what comes in, once: a second
    backward, and create_graph=True, raise RuntimeError. A graph break under torch.compile.
    """
    name = "linear_logprob_loss"
    reference = check_inputs(
        name, hidden, weight, labels, bias, temperature, softcap, want, ref_hidden, ref_weight, ref_bias
    )
    # Under no_grad a Function's own needs_input_grad still says True.
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, *results = _LinearLoss.apply(
        hidden, weight, bias, labels, token_loss, tuple(want), float(temperature), softcap, reference, needs,
        autocast_dtype(hidden),
    )  # fmt: skip
    return loss, wanted(want, results)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        token_loss: TokenLoss,
        want: tuple[str, ...],
        temperature: float,
        softcap: float | None,
        reference: Sequence[Tensor | None],
        needs: Sequence[bool],
        autocast: torch.dtype | None,
    ) -> tuple[Tensor, ...]:
        check_labels("linear_logprob_loss", labels, len(weight))
        options = {"temperature": temperature, "softcap": softcap}
        with torch.autocast(hidden.device.type, enabled=False):
            step = _Step((hidden, weight, bias), labels, reference, want, options, needs, autocast)
            losses = [step.rows(rows, token_loss) for rows in step.chunks()]
            ctx.gradients = step.gradients()
        ctx.set_materialize_grads(False)
        loss = torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)
        results = [x.view(labels.shape) if x.numel() == labels.numel() else x for x in step.results]
        ctx.mark_non_differentiable(*results)
        return loss, *results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_logprob_loss: gradients flow once; create_graph=True is not supported")
        if ctx.gradients is None:
            raise RuntimeError("linear_logprob_loss: its gradients were already taken; call it again")
        if grads[0] is None:
            return (None,) * 11
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if x is None else x.mul_(grads[0]) for x in gradients), *[None] * 8)


def row_counts(num_rows: int, logits_bytes: int, gradient_bytes: int | None) -> tuple[int, int]:
    """Rows whose logits are taken at a time, and those of a group, whose dlogits are kept for dweight.

    logits_bytes, gradient_bytes: of one row. None: there is no dweight.
    """
    group = num_rows if gradient_bytes is None else _even(num_rows, GRADIENT_BYTES // gradient_bytes)
    chunk = _even(group, LOGITS_BYTES // logits_bytes)
    return chunk, chunk if gradient_bytes is None else group


def _even(num_rows: int, most: int) -> int:
    """The rows of a part, where all are cut into as few as have at most so many, at least one: of one size but for the
    last, and whole tiles where a part has several."""
    step = ROW_STEP if most >= ROW_STEP else 1
    parts = -(-num_rows // max(most // step * step, 1))
    return max(min(-(-num_rows // (max(parts, 1) * step)) * step, num_rows), 1)


class _Step:
    """One pass over the rows: their losses, results and gradients."""

    def __init__(
        self,
        policy: tuple[Tensor, Tensor, Tensor | None],
        labels: Tensor,
        reference: Sequence[Tensor | None],
        want: tuple[str, ...],
        options: dict[str, Any],
        needs: Sequence[bool],
        autocast: torch.dtype | None,
    ):
        hidden, weight, self.bias = policy
        self.policy, self.reference = Head(hidden, weight, autocast), None
        self.labels, self.want, self.needs = labels.reshape(-1), want, needs
        self.options: dict[str, Any] = options
        self.ref_bias = reference[2]
        if reference[0] is not None and reference[1] is not None:
            self.reference = Head(reference[0], reference[1], autocast)
        self.results = new_results(self.labels, "entropy" in want, self.reference is not None)[:3]

        width = -(-len(weight) // SLICE_STEP) * SLICE_STEP
        num_rows, models, dtype = len(self.labels), 1 if self.reference is None else 2, self.policy.dtype
        self.chunk, self.group = row_counts(num_rows, 4 * models * width, dtype.itemsize * width if needs[1] else None)
        self.logits = hidden.new_empty((models, self.chunk, width), dtype=self.policy.logits_dtype)
        self.dlogits = hidden.new_empty((self.group if any(needs) else 0, width), dtype=dtype)
        self.dlogits[:, len(weight) :] = 0.0
        # One group of rows writes its dweight in the weight's dtype; several add up in float32.
        dtype = weight.dtype if self.group >= num_rows else torch.float32
        new = torch.empty_like if num_rows else torch.zeros_like
        self.dhidden = new(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.dweight = new(weight, dtype=dtype, memory_format=torch.contiguous_format) if needs[1] else None
        self.dbias = torch.zeros_like(self.bias, dtype=torch.float32) if needs[2] and self.bias is not None else None

    def chunks(self) -> Iterator[slice]:
        for group in slices(0, len(self.labels), self.group):
            yield from slices(group.start, group.stop, self.chunk)

    def rows(self, rows: slice, token_loss: TokenLoss) -> Tensor:
        """Sum of the rows' losses; results and, with the last rows of a group, gradients are filled in."""
        labels, columns = self.labels[rows].contiguous(), slice(0, len(self.policy.weight))
        logits = self._logits(0, self.policy, rows)
        ref = None if self.reference is None else self._logits(1, self.reference, rows)
        results = new_results(labels, "entropy" in self.want, ref is not None)
        options = self.options | {"bias": self.bias, "ref_bias": self.ref_bias, "columns": columns}
        forward(
            logits, ref, labels, results, total_columns=columns.stop, entropy="entropy" in self.want, **options
        )  # fmt: skip
        for whole, part in zip(self.results, results, strict=False):
            if whole.numel():
                whole[rows] = part
        loss, grads = _loss_and_grads(token_loss, wanted(self.want, results[:3]), rows)
        if any(self.needs):
            first = rows.start // self.group * self.group
            dlogits = self.dlogits[rows.start - first : rows.stop - first, columns]
            if any(g is not None for g in grads):
                backward(grads, logits, ref, labels, results, dlogits, **options)
            else:
                dlogits.zero_()
            if rows.stop in (first + self.group, len(self.labels)):
                self._take(slice(first, rows.stop))
        return loss

    def _logits(self, model: int, head: Head, rows: slice) -> Rows:
        hidden = head.hidden[rows]
        space = self.logits[model, : len(hidden)]
        for columns in head.slices():
            product(hidden, head.columns(columns).T, space[:, padded(columns)])
        return Rows(space, len(hidden), 0, space.stride(0))

    def _take(self, rows: slice) -> None:
        """Add a group of rows, whose dlogits stand in the workspace, to the gradients."""
        dlogits, hidden = self.dlogits[: rows.stop - rows.start], self.policy.hidden[rows]
        if self.dhidden is not None:
            self._take_hidden(dlogits, self.dhidden.view(-1, hidden.shape[1])[rows])
        if self.dweight is not None:
            # 0 * NaN is NaN: what stands in an ignored row must not reach dweight.
            hidden = hidden.masked_fill((self.labels[rows] == IGNORE).unsqueeze(1), 0.0)
            for columns in slices(0, len(self.dweight), WEIGHT_COLUMNS):
                out, turned = self.dweight[columns], dlogits[:, padded(columns)].T
                if rows.start == 0:
                    product(turned, hidden, out)
                else:
                    out += product(turned, hidden, torch.empty_like(out))
        if self.dbias is not None:
            self.dbias += dlogits[:, : len(self.dbias)].sum(0, dtype=torch.float32)

    def _take_hidden(self, dlogits: Tensor, out: Tensor) -> None:
        """out = dlogits @ weight, summed in float32."""
        first, *rest = self.policy.slices()
        total = torch.empty_like(out, dtype=torch.float32) if rest else out
        product(dlogits[:, padded(first)], self.policy.columns(first), total)
        for columns in rest:
            total += product(dlogits[:, padded(columns)], self.policy.columns(columns), torch.empty_like(total))
        if rest:
            out.copy_(total)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        # Before dweight may be copied to a shorter dtype.
        del self.logits, self.dlogits
        dweight = None if self.dweight is None else self.dweight.to(self.policy.weight.dtype)
        dbias = None if self.dbias is None or self.bias is None else self.dbias.to(self.bias.dtype)
        return self.dhidden, dweight, dbias


def _loss_and_grads(token_loss: TokenLoss, stats: TokenStats, rows: slice) -> tuple[Tensor, list[Tensor | None]]:
    """The rows' loss, and its gradient to each statistic, contiguous; None where it does not depend on one."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in stats]
        loss = token_loss(TokenStats(*leaves), rows)
        if loss.shape != (rows.stop - rows.start,):
            raise ValueError(
                f"linear_logprob_loss: token_loss must return one loss for each of {rows.stop - rows.start} tokens, "
                f"got shape {tuple(loss.shape)}"
            )
        loss = loss.float().sum()
        asked = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad(loss, asked, allow_unused=True) if loss.requires_grad else [None] * len(asked))
    grads = [None if x is None else next(found) for x in leaves]
    return loss.detach(), [None if g is None else g.contiguous() for g in grads]
