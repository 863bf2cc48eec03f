"""The CPU mode of kernels.py: chunked torch, eager log_softmax and torch's own chunked loss, in time and memory.

Time: all implementations by turns in one process, medians. Memory: a process of its own for each, which does the
work once; the figure is by how much its largest resident size exceeds the size before, inputs not counted.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from stamp import device_name
from torch import Tensor

from hybrid.functional import linear_logprob

COLUMNS = ["head", "N", "V", "D", "pass", "eager s", "ours s", "time ratio", "spread", "eager MiB", "ours MiB",
           "memory ratio", "torch s", "torch MiB"]  # fmt: skip
GPT2 = {"head": "gpt2", "N": 2048, "V": 50257, "D": 768}
DEMO = {"head": "demo", "N": 768, "V": 1280, "D": 128}
# The picture's axes, around GPT-2's head.
BY_N = [{**GPT2, "head": "by N", "N": n} for n in (256, 512, 1024, 4096)]
BY_V = [{**GPT2, "head": "by V", "N": 1024, "V": v} for v in (2048, 8192, 32768, 131072)]
PASSES = ["forward", "forward+backward"]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return torch.log_softmax(logits, -1).gather(1, labels.unsqueeze(1)).squeeze(1)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logprob = linear_logprob(hidden, weight, labels).logprob
    assert logprob is not None
    return logprob


def torchs_own(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss of torch's chunked head, torch >= 2.13: a mean, as its chunks give no loss per token."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="mean", options=options)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"eager": eager, "ours": ours}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    IMPLEMENTATIONS["torch"] = torchs_own


def measure(*, rounds: int, quick: bool) -> dict[str, Any]:
    if quick:
        return {"rounds": 1, "rows": [_row({**DEMO, "pass": name}, 1) for name in PASSES]}
    rows = [_row({**size, "pass": name}, rounds) for size in (GPT2, DEMO) for name in PASSES]
    # Fewer rounds for the picture: it shows orders of magnitude.
    rows += [_row({**size, "pass": name}, min(rounds, 3)) for size in BY_N + BY_V for name in PASSES]
    return {"rounds": rounds, "threads": torch.get_num_threads(), "dtype": "float32", "rows": rows}


def _row(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    # torch's own takes three times as long as the others: once for each head is enough.
    names = IMPLEMENTATIONS if case["head"] in ("gpt2", "demo") else ("eager", "ours")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    inputs = _inputs(case)
    for turn in range(rounds + 1):
        for name in seconds:
            start = time.perf_counter()
            _work(name, case["pass"], *inputs)
            if turn:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - start)
    row = dict(case)
    for name in seconds:
        row[f"{name} s"], row[f"{name} MiB"] = median(seconds[name]), _peak(name, case)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["eager"], strict=True)]
    row["time ratio"], row["memory ratio"] = row["ours s"] / row["eager s"], row["ours MiB"] / row["eager MiB"]
    row["spread"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return row


def _inputs(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    # In place, so that no copy has raised the process's largest size before the work begins.
    weight = torch.randn(case["V"], case["D"]).mul_(0.02)
    return torch.randn(case["N"], case["D"]), weight, torch.randint(case["V"], (case["N"],))


def _work(name: str, passes: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    run = IMPLEMENTATIONS[name]
    if passes == "forward":
        with torch.no_grad():
            run(hidden, weight, labels)
    else:
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        run(hidden, weight, labels).mean().neg().backward()


def _peak(name: str, case: dict[str, Any]) -> float:
    command = [sys.executable, __file__, json.dumps({**case, "name": name, "threads": torch.get_num_threads()})]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _print_peak(case: dict[str, Any]) -> None:
    """In the child: MiB of the largest resident size above the size before the work."""
    torch.set_num_threads(case["threads"])
    hidden, weight, labels = _inputs(case)
    _work(case["name"], case["pass"], hidden[:8], weight[:64], labels[:8] % 64)  # loads what the libraries load
    before = _resident("VmRSS")
    _work(case["name"], case["pass"], hidden, weight, labels)
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    """MiB now (VmRSS) or at most so far (VmHWM).   getrusage's ru_maxrss would be the parent's, kept over exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def draw(result: dict[str, Any], file: Path) -> None:
    """Memory and time of forward + backward by N and by V."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if row["pass"] == "forward+backward" and row["head"] != "demo"]
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for column, (axis, other, at) in enumerate((("N", "V", 50257), ("V", "N", 1024))):
        chosen = sorted((row for row in rows if row[other] == at), key=lambda row: row[axis])
        for line, unit in zip(axes[:, column], ("MiB", "s"), strict=True):
            for name in ("eager", "ours"):
                line.plot([row[axis] for row in chosen], [row[f"{name} {unit}"] for row in chosen], "o-", label=name)
            line.set(xscale="log", yscale="log", xlabel=f"{axis}   ({other} = {at}, D = 768)", ylabel=unit)
            line.minorticks_off()
            line.set_xticks([row[axis] for row in chosen], [str(row[axis]) for row in chosen], rotation=30)
            line.legend()
    figure.suptitle(f"Forward + backward of the head in float32, {device_name('cpu')}")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    _print_peak(json.loads(sys.argv[1]))
