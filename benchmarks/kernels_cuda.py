"""The GPU mode of kernels.py: the table of spec/kernels.md, measured against two ceilings and the peers.

Ceilings, measured in this process before each size: BW, the bandwidth of a copy (bytes read plus bytes written), and
G, the time of one bf16 product of 2 N V D operations, aligned. L is the bytes of the bf16 logits.
Time: CUDA events around each call, implementations by turns, medians. Extra memory: the largest allocation above what
stood before, less the gradients that are returned.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bandwidth import copy_bandwidth
from kernels_peers import HEAD, HEAD_LOSS, HEAD_LOSS_KL, LOGITS, LOGITS_KL, compiled_stats, eager_stats, gradients
from torch import Tensor

from hybrid_kernels import linear_logprob, linear_logprob_loss, token_stats

COLUMNS = [
    "case",
    "V",
    "D",
    "N",
    "who",
    "ms",
    "spread",
    "measured / allowed",
    "x ours",
    "extra MiB",
    "memory / allowed",
]
DEVICE = "cuda"
HEADS = [(50257, 768), (128256, 4096), (151936, 3584)]  # GPT-2, Llama-3-8B, Qwen2.5-7B
ROWS = [8192, 16384]
GIB = 2**30
# What a peer that is missing, too old or too large for the memory raises; it becomes a line of the table.
FAILURES = (ImportError, AttributeError, RuntimeError, TypeError, ValueError, AssertionError)

Work = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One line of spec/kernels.md's table: the work, by who does it, and what it may take."""

    name: str
    ours: Work
    peers: dict[str, Work]
    seconds: float
    extra: float | None = None  # bytes


def measure(*, rounds: int, quick: bool) -> dict[str, Any]:
    heads, num_rows = ([(1000, 64)], [1024]) if quick else (HEADS, ROWS)
    ceilings, rows = [], []
    for vocab, width in heads:
        for num in num_rows:
            bandwidth, product = (
                copy_bandwidth(DEVICE, 64 if quick else 4096),
                product_seconds(num, vocab, width, rounds),
            )
            ceilings.append({"V": vocab, "D": width, "N": num, "GB/s": bandwidth / 1e9, "G ms": product * 1e3})
            for cases in (from_logits, from_hidden):
                for case in cases(num, vocab, width, bandwidth, product):
                    rows += [{"V": vocab, "D": width, "N": num, **row} for row in measured(case, rounds)]
                torch.cuda.empty_cache()
    return {"rounds": rounds, "dtype": "bfloat16", "ceilings": ceilings, "rows": rows}


def product_seconds(num: int, vocab: int, width: int, rounds: int) -> float:
    """Of a vocabulary padded to a multiple of 64: unaligned, GPT-2's took 6.8 ms on an H200, not .91."""
    columns = -(-vocab // 64) * 64
    hidden, weight = _normal(num, width), _normal(columns, width)
    out = hidden.new_empty(num, columns)
    return median(seconds({"G": lambda: torch.mm(hidden, weight.T, out=out)}, rounds)["G"])


def from_logits(num: int, vocab: int, width: int, bandwidth: float, product: float) -> Iterator[Case]:
    logits, labels = _normal(num, vocab).requires_grad_(), _labels(num, vocab)
    size = logits.nbytes
    once = size / bandwidth
    both, all_three = ("logprob", "entropy"), ("logprob", "entropy", "kl")

    def forward(stats: Callable[..., Any], **options: Any) -> Work:
        return lambda: _without_graph(lambda: stats(logits, labels, **options))

    yield Case(
        "logits forward",
        forward(token_stats, want=both),
        {"eager": forward(eager_stats), "torch.compile": forward(compiled_stats)},
        (1.35 if vocab % 8 == 0 else 1.8) * once,
    )
    yield Case(
        "logits forward + backward",
        lambda: gradients(_total(token_stats(logits, labels, want=both)), [logits]),
        _bound(LOGITS, logits, labels),
        1.45 * 3 * once,
        1.02 * size,
    )
    ref_logits = _normal(num, vocab)
    yield Case(
        "logits forward + backward, KL",
        lambda: gradients(_total(token_stats(logits, labels, want=all_three, ref_logits=ref_logits)), [logits]),
        _bound(LOGITS_KL, logits, labels, ref_logits),
        1.45 * 5 * once,
        1.02 * size,
    )


def from_hidden(num: int, vocab: int, width: int, bandwidth: float, product: float) -> Iterator[Case]:
    hidden, weight = _normal(num, width).requires_grad_(), _normal(vocab, width).requires_grad_()
    labels, inputs = _labels(num, vocab), [hidden, weight]
    # The two limits are said for N = 8192 and the two large heads.
    limited = num == 8192 and vocab > 100_000
    recompute, in_forward = (1.0 * GIB, 3.2 * GIB) if limited else (None, None)

    yield Case(
        "hidden forward",
        lambda: _without_graph(lambda: linear_logprob(hidden, weight, labels)),
        {who: lambda work=work: _without_graph(work) for who, work in _bound(HEAD, hidden, weight, labels).items()},
        (1.9 if width < 1024 else 1.25) * product,
    )

    def recomputed(**options: Any) -> Work:
        return lambda: gradients(_total(linear_logprob(hidden, weight, labels, **options), -1.0), inputs)

    def taken_in_forward(**options: Any) -> Work:
        def token_loss(stats: Any, rows: slice) -> Tensor:
            return (-stats.logprob if stats.kl is None else stats.kl - stats.logprob) / num

        return lambda: gradients(linear_logprob_loss(hidden, weight, labels, token_loss, **options)[0], inputs)

    peers = _bound(HEAD_LOSS, hidden, weight, labels)
    yield Case("hidden loss, recompute", recomputed(), peers, 1.30 * 4 * product, recompute)
    yield Case(
        "hidden loss, logits kept",
        recomputed(keep_bytes=4 * num * (vocab + 64)),
        {"torch.compile": peers["torch.compile"]},
        1.30 * 3 * product,
    )
    yield Case(
        "hidden loss, gradient in forward",
        taken_in_forward(),
        {"torch.compile": peers["torch.compile"]},
        1.30 * 3 * product,
        in_forward,
    )
    reference = {"ref_hidden": _normal(num, width), "ref_weight": _normal(vocab, width), "want": ("logprob", "kl")}
    peers = _bound(HEAD_LOSS_KL, hidden, weight, labels, reference["ref_hidden"], reference["ref_weight"])
    yield Case("hidden loss, KL, recompute", recomputed(**reference), peers, 1.35 * 6 * product, recompute)
    yield Case(
        "hidden loss, KL, gradient in forward",
        taken_in_forward(**reference),
        {"torch.compile": peers["torch.compile"]},
        1.35 * 4 * product,
        in_forward,
    )


def measured(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row for each implementation, ours first; one that fails has its error in place of its figures."""
    extra: dict[str, float] = {}
    works, rows = {"ours": case.ours, **case.peers}, []
    for who, work in works.items():
        try:
            extra[who] = extra_memory(work)
        except FAILURES as error:
            if who == "ours":
                raise
            rows.append({"case": case.name, "who": f"{who}: {type(error).__name__}", "error": str(error)[:300]})
            torch.cuda.empty_cache()
    times = seconds({who: works[who] for who in extra}, rounds)
    for who, at in reversed(times.items()):
        row = {"case": case.name, "who": who, "ms": median(at) * 1e3, "extra MiB": extra[who] / 2**20}
        row["spread"] = f"{min(at) * 1e3:.3g} to {max(at) * 1e3:.3g}"
        row["measured / allowed"] = median(at) / case.seconds
        row["x ours"] = median(at) / median(times["ours"])
        row["memory / allowed"] = None if case.extra is None else extra[who] / case.extra
        rows.insert(0, row)
    return rows


def seconds(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` of each by turns, after two that warm up and compile."""
    times: dict[str, list[float]] = {who: [] for who in works}
    for turn in range(rounds + 2):
        for who, work in works.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                times[who].append(start.elapsed_time(end) / 1e3)
    return times


def extra_memory(work: Work) -> float:
    work()  # compiles, and makes the workspaces of the libraries
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    tensors = result if isinstance(result, tuple) else (result,)
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in tensors if isinstance(x, Tensor))


def _without_graph(work: Work) -> Any:
    with torch.no_grad():
        return work()


def _total(stats: Any, factor: float = 1.0) -> Tensor:
    """The mean of every statistic that is there, added up; the log-probability times `factor`."""
    means = [x.mean() for x in (stats.entropy, stats.kl) if x is not None]
    return factor * stats.logprob.mean() + (torch.stack(means).sum() if means else 0.0)


def _bound(peers: dict[str, Callable[..., Any]], *inputs: Tensor) -> dict[str, Work]:
    return {name: lambda peer=peer: peer(*inputs) for name, peer in peers.items()}  # type: ignore[misc]


def _normal(*size: int) -> Tensor:
    return torch.randn(*size, device=DEVICE, dtype=torch.bfloat16) * (1.0 if len(size) < 2 else 0.05)


def _labels(num: int, vocab: int) -> Tensor:
    return torch.randint(vocab, (num,), device=DEVICE)


def draw(result: dict[str, Any], file: Path) -> None:
    """Time over what is allowed, and extra memory, of every implementation by head and rows, for two of the cases."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for column, case in enumerate(("logits forward + backward", "hidden loss, recompute")):
        rows = [row for row in result["rows"] if row["case"] == case and "ms" in row]
        sizes = list(dict.fromkeys(f"V {row['V']}\nN {row['N']}" for row in rows))
        for line, figure_of in zip(axes[:, column], ("measured / allowed", "extra MiB"), strict=True):
            for who in dict.fromkeys(row["who"] for row in rows):
                mine = {f"V {row['V']}\nN {row['N']}": row[figure_of] for row in rows if row["who"] == who}
                line.plot(sizes, [mine.get(size, float("nan")) for size in sizes], "o-", label=who)
            line.set(title=case, ylabel=figure_of, yscale="log")
            line.legend(fontsize=7)
    figure.savefig(file, dpi=110)
