"""The two Triton kernels: statistics of a row of logits, and the gradient of those statistics.

Maths, with z the logits after bias and soft-cap (z <- c tanh(z / c)), T the temperature, m = max z:

    s = sum exp((z - m) / T)                        p = exp((z - m) / T) / s
    logprob = (z_label - m) / T - log s
    entropy = log s - sum exp((z - m) / T) (z - m) / (T s)
    kl      = log s_ref - log s - sum exp((z - m) / T) ((z_ref - m_ref) - (z - m)) / (T s)

    dz = (g_logprob (1[label] - p) - g_entropy p (log p + entropy) + g_kl p (log p - log q - kl)) / T

Every sum is relative to a running maximum; m and log s are kept apart, for their sum would lose the digits that a
large common offset of the logits takes. 0 * -inf (a masked vocabulary) is 0, forward and backward.

One program owns one row, on grid.x. Its columns come in tiles of lanes x width; each lane has its own running
statistics, merged once at the end, so the loop has no barrier. A row of an odd vocabulary starts anywhere: the
tiles start at the last multiple of 8 elements in memory before it, so that the inner tiles need no mask and load
16 bytes a thread; the first and the last tile are masked exactly, and nothing outside the row is read.

`state` (7, N) float32 carries a row's statistics from one vocabulary slice to the next:
    running:  m, s,     z_label, sum e (z - m), sum e gap, m_ref, s_ref
    finished: m, log_s, -,       -,             -,         m_ref, log_s_ref

Bytes moved per token: forward V * itemsize (twice that with a reference), backward as much read and V * itemsize
written. What is kept between them is 4 floats.
"""

import triton
import triton.language as tl

__all__ = ["IGNORE", "STATE_ROWS", "backward_kernel", "forward_kernel"]

STATE_ROWS = 7
IGNORE = -100
_IGNORE = tl.constexpr(IGNORE)
# What differs from call to call must not make a new variant of a kernel.
_VARYING = [
    "num_rows",
    "num_columns",
    "first_column",
    "total_columns",
    "inner",
    "skew",
    "outer_stride",
    "inner_stride",
    "ref_outer_stride",
    "ref_inner_stride",
]
_LOG2E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts. Finite, so that no -inf - -inf arises in a row that begins with masked columns.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _logits(
    ptr, bias_ptr, offset, before, inside, softcap, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, EDGE: tl.constexpr
):
    """A tile of logits in float32, -inf outside the row, and the slope of the soft-cap there."""
    if EDGE:
        z = tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            z += tl.load(bias_ptr + offset - before, mask=inside, other=0.0).to(tl.float32)
    else:
        z = tl.load(ptr + offset).to(tl.float32)
        if BIAS:
            z += tl.load(bias_ptr + offset - before).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        # libdevice's tanh cannot be interpreted; exp(-2|x|) <= 1 cannot overflow.
        decay = tl.exp(-2.0 * tl.abs(z) / softcap)
        tanh = (1.0 - decay) / (1.0 + decay)
        slope = 1.0 - tanh * tanh
        z = tl.where(z < 0, -softcap, softcap) * tanh
    if EDGE:
        z = tl.where(inside, z, float("-inf"))
    return z, slope


@triton.jit
def _moved(shrink, total, step, s):
    """sum e (x + step) from total = sum e x and s = sum e, when every e shrinks; 0 where all of it vanishes."""
    return tl.where(shrink == 0.0, 0.0, shrink * (total + step * s))


@triton.jit
def _take_in(z, ref, m, s, depth, gap, ref_m, ref_s, scale, ENTROPY: tl.constexpr, KL: tl.constexpr):
    """Add a tile (lanes, width) to the lanes' statistics. `scale` is log2(e) / T."""
    old_m, old_s = m, s
    m = tl.maximum(old_m, tl.max(z, 1))
    step = old_m - m
    shrink = tl.exp2(step * scale)
    below = z - m[:, None]
    e = tl.exp2(below * scale)
    s = old_s * shrink + tl.sum(e, 1)
    if ENTROPY:
        # The floor turns 0 * -inf into 0.
        depth = _moved(shrink, depth, step, old_s) + tl.sum(e * tl.maximum(below, -1e30), 1)
    if KL:
        old_ref_m = ref_m
        ref_m = tl.maximum(old_ref_m, tl.max(ref, 1))
        ref_step = old_ref_m - ref_m
        ref_below = ref - ref_m[:, None]
        ref_s = ref_s * tl.exp2(ref_step * scale) + tl.sum(tl.exp2(ref_below * scale), 1)
        gap = _moved(shrink, gap, ref_step - step, old_s)
        gap += tl.sum(tl.where(e == 0.0, 0.0, e * (ref_below - below)), 1)
    return m, s, depth, gap, ref_m, ref_s


@triton.jit
def _row_start(row, inner, outer_stride, inner_stride):
    """Element offset of a row of an (outer, inner, V) tensor, int64."""
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def _aligned(ptr, start, skew, ALIGN: tl.constexpr):
    """ptr + start, down to a multiple of ALIGN elements in memory; ptr itself is `skew` elements past one."""
    ptr += (start + skew) // ALIGN * ALIGN - skew
    if ALIGN > 1:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    logits_ptr, ref_ptr, bias_ptr, ref_bias_ptr, labels_ptr, state_ptr, logprob_ptr, entropy_ptr, kl_ptr,
    num_rows, num_columns, first_column, total_columns, inner, skew, outer_stride, inner_stride,
    ref_outer_stride, ref_inner_stride, temperature, softcap,
    ENTROPY: tl.constexpr, KL: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, REF_BIAS: tl.constexpr,
    ALIGN: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add columns [first_column, first_column + num_columns) to `state`; with the last of them write the results.

    logits, ref and the biases hold just those columns. In memory the row starts of all tensors agree modulo ALIGN
    elements, and logits_ptr is `skew` elements past a multiple of ALIGN.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    later = first_column > 0
    last = first_column + num_columns == total_columns
    if label == _IGNORE:
        tl.store(logprob_ptr + row, 0.0, mask=last)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0, mask=last)
        if KL:
            tl.store(kl_ptr + row, 0.0, mask=last)
    else:
        tl.device_assert((label >= 0) & (label < total_columns), "label outside the vocabulary")
        scale = _LOG2E / temperature
        start = _row_start(row, inner, outer_stride, inner_stride)
        logits = _aligned(logits_ptr, start, skew, ALIGN)
        ref_logits = ref_ptr
        if KL:
            ref_start = _row_start(row, inner, ref_outer_stride, ref_inner_stride)
            ref_logits = _aligned(ref_ptr, ref_start, skew, ALIGN)
        before = ((start + skew) % ALIGN).to(tl.int32)
        end = before + num_columns
        TILE: tl.constexpr = LANES * WIDTH
        num_tiles = tl.cdiv(end, TILE)
        in_tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]

        m = tl.full((LANES,), _LOWEST, tl.float32)
        s = tl.zeros((LANES,), tl.float32)
        depth, gap, ref_m, ref_s = s, s, m, s
        # The first and the last tile, which are one where the vocabulary is small.
        for tile in range(0, num_tiles, tl.maximum(num_tiles - 1, 1)):
            offset = tile * TILE + in_tile
            inside = (offset >= before) & (offset < end)
            z, _ = _logits(logits, bias_ptr, offset, before, inside, softcap, SOFTCAP, BIAS, True)
            ref = z
            if KL:
                ref, _ = _logits(ref_logits, ref_bias_ptr, offset, before, inside, softcap, SOFTCAP, REF_BIAS, True)
            m, s, depth, gap, ref_m, ref_s = _take_in(z, ref, m, s, depth, gap, ref_m, ref_s, scale, ENTROPY, KL)
        for tile in range(1, num_tiles - 1):
            offset = tile * TILE + in_tile
            z, _ = _logits(logits, bias_ptr, offset, before, offset, softcap, SOFTCAP, BIAS, False)
            ref = z
            if KL:
                ref, _ = _logits(ref_logits, ref_bias_ptr, offset, before, offset, softcap, SOFTCAP, REF_BIAS, False)
            m, s, depth, gap, ref_m, ref_s = _take_in(z, ref, m, s, depth, gap, ref_m, ref_s, scale, ENTROPY, KL)

        # The lanes become one; what the slices before left in `state` counts as one more lane.
        stride = tl.cast(num_rows, tl.int64)
        at = state_ptr + row
        old_m, old_s = tl.load(at, mask=later, other=_LOWEST), tl.load(at + stride, mask=later, other=0.0)
        top = tl.maximum(tl.max(m, 0), old_m)
        step, old_step = m - top, old_m - top
        shrink, old_shrink = tl.exp2(step * scale), tl.exp2(old_step * scale)
        total_s = tl.sum(s * shrink, 0) + old_s * old_shrink
        log_s = tl.log(total_s)
        tl.store(at, top)
        tl.store(at + stride, tl.where(last, log_s, total_s))

        column = label - first_column
        hit = (column >= 0) & (column < num_columns)
        found, _ = _logits(logits_ptr + start, bias_ptr, tl.where(hit, column, 0), 0, hit, softcap, SOFTCAP, BIAS, True)
        # A label outside the vocabulary is never read: its log-probability is NaN.
        label_logit = tl.where(hit, found, tl.load(at + 2 * stride, mask=later, other=float("nan")))
        tl.store(at + 2 * stride, label_logit)
        tl.store(logprob_ptr + row, (label_logit - top) / temperature - log_s, mask=last)
        if ENTROPY:
            old_depth = tl.load(at + 3 * stride, mask=later, other=0.0)
            depth = tl.sum(_moved(shrink, depth, step, s), 0) + _moved(old_shrink, old_depth, old_step, old_s)
            tl.store(at + 3 * stride, depth)
            tl.store(entropy_ptr + row, log_s - depth / (temperature * total_s), mask=last)
        if KL:
            old_ref_m = tl.load(at + 5 * stride, mask=later, other=_LOWEST)
            old_ref_s = tl.load(at + 6 * stride, mask=later, other=0.0)
            ref_top = tl.maximum(tl.max(ref_m, 0), old_ref_m)
            ref_step, old_ref_step = ref_m - ref_top, old_ref_m - ref_top
            ref_total_s = tl.sum(ref_s * tl.exp2(ref_step * scale), 0) + old_ref_s * tl.exp2(old_ref_step * scale)
            ref_log_s = tl.log(ref_total_s)
            tl.store(at + 5 * stride, ref_top)
            tl.store(at + 6 * stride, tl.where(last, ref_log_s, ref_total_s))
            old_gap = tl.load(at + 4 * stride, mask=later, other=0.0)
            total_gap = tl.sum(_moved(shrink, gap, ref_step - step, s), 0)
            total_gap += _moved(old_shrink, old_gap, old_ref_step - old_step, old_s)
            tl.store(at + 4 * stride, total_gap)
            tl.store(kl_ptr + row, (ref_log_s - log_s) - total_gap / (temperature * total_s), mask=last)


@triton.jit
def _grad_tile(
    logits, ref_logits, grad_row, bias_ptr, ref_bias_ptr, offset, before, inside, label, g_logprob, g_entropy, g_kl,
    entropy, kl, m, log_s, ref_m, ref_log_s, sharpness, softcap, ENTROPY: tl.constexpr, KL: tl.constexpr,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, REF_BIAS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Compute and store one tile of dz. `sharpness` is 1 / T, which the g already hold."""
    z, cap_slope = _logits(logits, bias_ptr, offset, before, inside, softcap, SOFTCAP, BIAS, EDGE)
    logp = (z - m) * sharpness - log_s
    p = tl.exp2(logp * _LOG2E)
    slope = tl.zeros_like(z) - g_logprob
    if ENTROPY:
        slope -= g_entropy * (logp + entropy)
    if KL:
        ref, _ = _logits(ref_logits, ref_bias_ptr, offset, before, inside, softcap, SOFTCAP, REF_BIAS, EDGE)
        logq = (ref - ref_m) * sharpness - ref_log_s
        # An infinite KL that enters no loss leaves the other gradients alone.
        slope += tl.where(g_kl == 0.0, 0.0, g_kl * ((logp - logq) - kl))
    grad = tl.where(p == 0.0, 0.0, p * slope) + tl.where(offset - before == label, g_logprob, 0.0)
    if SOFTCAP:
        grad *= cap_slope
    grad = grad.to(grad_row.dtype.element_ty)
    if EDGE:
        tl.store(grad_row + offset, grad, mask=inside)
    else:
        tl.store(grad_row + offset, grad)


@triton.jit(do_not_specialize=[*_VARYING, "grad_stride"])
def backward_kernel(
    logits_ptr, ref_ptr, bias_ptr, ref_bias_ptr, labels_ptr, state_ptr, entropy_ptr, kl_ptr,
    g_logprob_ptr, g_entropy_ptr, g_kl_ptr, grad_ptr, num_rows, num_columns, first_column, inner, skew,
    outer_stride, inner_stride, ref_outer_stride, ref_inner_stride, grad_stride, temperature, softcap,
    LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, KL: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    REF_BIAS: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """grad[row, :num_columns] = d loss / d logits of those columns; 0 in ignored rows, whose logits are not read."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    start = _row_start(row, inner, outer_stride, inner_stride)
    before = ((start + skew) % ALIGN).to(tl.int32)
    end = before + num_columns
    grad_row = _aligned(grad_ptr, row * grad_stride, skew, ALIGN)
    TILE: tl.constexpr = LANES * WIDTH
    num_tiles = tl.cdiv(end, TILE)
    in_tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if label == _IGNORE:
        nothing = tl.zeros((LANES, WIDTH), grad_ptr.dtype.element_ty)
        for tile in range(num_tiles):
            offset = tile * TILE + in_tile
            tl.store(grad_row + offset, nothing, mask=(offset >= before) & (offset < end))
    else:
        logits = _aligned(logits_ptr, start, skew, ALIGN)
        ref_logits = ref_ptr
        stride = tl.cast(num_rows, tl.int64)
        at = state_ptr + row
        m, log_s = tl.load(at), tl.load(at + stride)
        sharpness = 1.0 / temperature
        ref_m, ref_log_s, kl, entropy, g_logprob, g_entropy, g_kl = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        if LOGPROB:
            g_logprob = tl.load(g_logprob_ptr + row) * sharpness
        if ENTROPY:
            entropy, g_entropy = tl.load(entropy_ptr + row), tl.load(g_entropy_ptr + row) * sharpness
        if KL:
            ref_start = _row_start(row, inner, ref_outer_stride, ref_inner_stride)
            ref_logits = _aligned(ref_ptr, ref_start, skew, ALIGN)
            ref_m, ref_log_s = tl.load(at + 5 * stride), tl.load(at + 6 * stride)
            kl, g_kl = tl.load(kl_ptr + row), tl.load(g_kl_ptr + row) * sharpness
        column = label - first_column
        column = tl.where((column >= 0) & (column < num_columns), column, -ALIGN).to(tl.int32)
        for tile in range(0, num_tiles, tl.maximum(num_tiles - 1, 1)):
            offset = tile * TILE + in_tile
            inside = (offset >= before) & (offset < end)
            _grad_tile(
                logits, ref_logits, grad_row, bias_ptr, ref_bias_ptr, offset, before, inside, column,
                g_logprob, g_entropy, g_kl, entropy, kl, m, log_s, ref_m, ref_log_s, sharpness, softcap,
                ENTROPY, KL, SOFTCAP, BIAS, REF_BIAS, True,
            )  # fmt: skip
        for tile in range(1, num_tiles - 1):
            offset = tile * TILE + in_tile
            _grad_tile(
                logits, ref_logits, grad_row, bias_ptr, ref_bias_ptr, offset, before, offset, column,
                g_logprob, g_entropy, g_kl, entropy, kl, m, log_s, ref_m, ref_log_s, sharpness, softcap,
                ENTROPY, KL, SOFTCAP, BIAS, REF_BIAS, False,
            )  # fmt: skip
