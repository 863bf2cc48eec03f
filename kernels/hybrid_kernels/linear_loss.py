"""A loss of the log-probabilities, entropies and KLs, with its gradient taken in the forward pass.

`linear_logprob` takes the head's product again in its backward pass, because a loss may be anything. A loss that is a
sum over tokens, each of its own statistics, with masks and global normalisers known before, needs no second product:

    for a few rows:  logits = hidden @ weight.T;  statistics;  g = d loss / d statistics;  dlogits
                     dhidden[rows] = dlogits @ weight
    for more rows:   dweight += dlogits.T @ hidden[rows]    in float32

6 N V D operations instead of 8 (8 instead of 12 with a KL; 4 with a frozen head). Bytes per token beside the GEMMs'
operands: 12 V of float32 logits and dlogits (8 V more with a KL), and 12 V D a group of rows for dweight. Memory:
LOGITS_BYTES of logits, GRADIENT_BYTES of dlogits, and dweight in float32, which `linear_logprob` has no need for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.launch import IGNORE, Rows, TokenStats, backward, check_labels, forward, new_results, wanted
from hybrid_kernels.linear_logprob import SLICE_STEP, check_inputs, operand_dtype, product, product_dtype

__all__ = ["linear_logprob_loss"]

# Chosen by arithmetic, not yet by a clock. Rows of logits: 256 MiB are 500 rows of 128k columns, enough for the GEMM
# to be limited by its operations. Rows of dlogits: dweight is read and written once for so many.
LOGITS_BYTES = 256 * 2**20
GRADIENT_BYTES = 640 * 2**20
# Columns of dweight that are accumulated at a time, from one more workspace.
DWEIGHT_COLUMNS = 8192

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
    The other arguments are those of `linear_logprob`.
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
        hidden, weight, bias, labels, token_loss, tuple(want), float(temperature), softcap, reference, needs
    )
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
    ) -> tuple[Tensor, ...]:
        check_labels("linear_logprob_loss", labels, len(weight))
        options = {"temperature": temperature, "softcap": softcap}
        with torch.autocast(hidden.device.type, enabled=False):
            step = _Step((hidden, weight, bias), labels, reference, want, options, needs)
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
            return (None,) * 10
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if x is None else x.mul_(grads[0]) for x in gradients), *[None] * 7)


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
    ):
        hidden, weight, self.bias = policy
        self.dtype = operand_dtype(hidden, weight)
        self.hidden, self.weight = hidden.reshape(-1, hidden.shape[-1]).to(self.dtype), weight.to(self.dtype)
        self.labels, self.want, self.needs = labels.reshape(-1), want, needs
        self.options: dict[str, Any] = options
        self.ref_bias = reference[2]
        self.reference = None
        if reference[0] is not None and reference[1] is not None:
            dtype = operand_dtype(reference[0], reference[1])
            self.reference = reference[0].reshape(-1, reference[0].shape[-1]).to(dtype), reference[1].to(dtype)
        self.results = new_results(self.labels, "entropy" in want, self.reference is not None)[:3]

        self.columns = slice(0, len(weight))
        width = -(-len(weight) // SLICE_STEP) * SLICE_STEP
        num_rows, models = len(self.labels), 1 if self.reference is None else 2
        chunk = LOGITS_BYTES // (4 * models * width)
        chunk = chunk // 64 * 64 or max(chunk, 1)  # whole tiles of a GEMM
        self.chunk = max(min(chunk, num_rows), 1)
        groups = max(GRADIENT_BYTES // (self.dtype.itemsize * self.chunk * width), 1) if needs[1] else 1
        self.group = min(groups * self.chunk, -(-num_rows // self.chunk) * self.chunk)
        self.logits = hidden.new_empty((models, self.chunk, width), dtype=product_dtype(hidden, self.dtype))
        needed = any(needs)
        self.dlogits = hidden.new_empty((self.group if needed else 0, width), dtype=self.dtype)
        # One group of rows writes its dweight in the weight's dtype; several add up in float32.
        dtype = weight.dtype if self.group >= num_rows else torch.float32
        self.dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs[1] else None
        self.dbias = torch.zeros_like(self.bias, dtype=torch.float32) if needs[2] and self.bias is not None else None
        self.dtypes = weight.dtype, None if self.bias is None else self.bias.dtype

    def chunks(self) -> list[slice]:
        num_rows = len(self.labels)
        return [slice(start, min(start + self.chunk, num_rows)) for start in range(0, num_rows, self.chunk)]

    def rows(self, rows: slice, token_loss: TokenLoss) -> Tensor:
        """Sum of the rows' losses; results and gradients are filled in."""
        labels, width = self.labels[rows].contiguous(), len(self.weight)
        logits = self._logits(0, self.hidden[rows], self.weight)
        ref = None
        if self.reference is not None:
            ref = self._logits(1, self.reference[0][rows], self.reference[1])
        results = new_results(labels, "entropy" in self.want, ref is not None)
        options = self.options | {"bias": self.bias, "ref_bias": self.ref_bias}
        forward(
            logits, ref, labels, results, columns=self.columns, total_columns=width, entropy="entropy" in self.want,
            **options,
        )  # fmt: skip
        for whole, part in zip(self.results, results, strict=False):
            if whole.numel():
                whole[rows] = part
        loss, grads = _loss_and_grads(token_loss, wanted(self.want, results[:3]), rows)
        if any(self.needs):
            start = rows.start % self.group
            dlogits = self.dlogits[start : start + len(labels), :width]
            if any(g is not None for g in grads):
                backward(
                    grads, logits, ref, labels, results, dlogits, columns=self.columns, **options
                )  # fmt: skip
            else:
                dlogits.zero_()
            self._accumulate(rows, dlogits)
        return loss

    def _logits(self, model: int, hidden: Tensor, weight: Tensor) -> Rows:
        space = self.logits[model, : len(hidden)]
        return Rows(product(hidden, weight.T, space[:, : len(weight)]), len(hidden), 0, space.stride(0))

    def _accumulate(self, rows: slice, dlogits: Tensor) -> None:
        if self.dhidden is not None:
            product(dlogits, self.weight, self.dhidden.view(-1, self.hidden.shape[1])[rows])
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=torch.float32)
        if self.dweight is not None and (rows.stop % self.group == 0 or rows.stop == len(self.labels)):
            first = (rows.stop - 1) // self.group * self.group
            # 0 * NaN is NaN: what stands in an ignored row must not reach dweight.
            ignored = (self.labels[first : rows.stop] == IGNORE).unsqueeze(1)
            hidden = self.hidden[first : rows.stop].masked_fill(ignored, 0.0)
            for start in range(0, len(self.weight), DWEIGHT_COLUMNS):
                columns = slice(start, min(start + DWEIGHT_COLUMNS, len(self.weight)))
                one_group, turned = self.group >= len(self.labels), self.dlogits[: len(hidden), columns].T
                out = self.dweight[columns]
                if one_group:
                    product(turned, hidden, out)
                else:
                    out += product(turned, hidden, torch.empty_like(out))

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dweight = None if self.dweight is None else self.dweight.to(self.dtypes[0])
        return self.dhidden, dweight, None if self.dbias is None else self.dbias.to(self.dtypes[1])


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
