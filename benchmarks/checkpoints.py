"""What checkpoints cost: the seconds of one, by part, as a share of the steps between two at the default interval.

    python benchmarks/checkpoints.py

Trains the demo as it is, and SmolLM2-135M for two cycles of examples/reviews.yaml; then saves each `ROUNDS` times more.
Writes benchmarks/results/checkpoints-<device>.json.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":
    sys.path[0] = str(ROOT)

from transformers.utils import logging  # noqa: E402

from benchmarks.stamp import device_name, stamp  # noqa: E402
from hybrid import HybridConfig, HybridTrainer  # noqa: E402
from hybrid.demo import run_demo  # noqa: E402
from hybrid.demo.smollm2 import get_smollm2  # noqa: E402
from hybrid.resume import checkpoint_state, write_checkpoint  # noqa: E402
from hybrid.run import CheckpointConfig, Checkpoints, read_jsonl  # noqa: E402

ROUNDS = 7
# The functions whose time is told apart; what one calls of another is the other's.
PARTS = {
    "model": "hybrid.models.policy.Policy.save_pretrained",
    "state": "hybrid.resume.save_state",
    "hash": "hybrid.run.checkpoints._sha256",
    "fsync": "os.fsync",
    "delete": "hybrid.run.checkpoints.Checkpoints._rotate",
}


def main() -> None:
    logging.disable_progress_bar()
    (ROOT / "runs").mkdir(exist_ok=True)
    # Beside the runs: /tmp is memory on some machines, where nothing is written to a disk.
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder:
        rows = [_costs("demo", *_demo(Path(folder))), _costs("SmolLM2-135M, reviews", *_reviews(Path(folder)))]
    line = "{model:22} {megabytes:7.1f} MB {seconds:6.2f} s {megabytes_per_second:5.0f} MB/s   step {step_s:6.2f} s   "
    for row in rows:
        parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in row["parts"].items())
        print(line.format(**row) + f"share {row['share']:.3%}   ({parts})")
    result = {
        "benchmark": "checkpoints",
        **stamp("safetensors"),
        "interval": CheckpointConfig().every,
        "rounds": ROUNDS,
        "seed": 0,
        "rows": rows,
    }
    file = ROOT / "benchmarks" / "results" / f"checkpoints-{device_name()}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(file.relative_to(ROOT))


def _demo(folder: Path) -> tuple[HybridTrainer, Path]:
    run = run_demo(output=str(folder / "demo")).folder
    assert run is not None
    return HybridTrainer.resume(run), run


def _reviews(folder: Path) -> tuple[HybridTrainer, Path]:
    run = folder / "reviews"
    few = {"mixing.cycles": 2, "eval.num_prompts": 8, "eval.num_examples": 8}
    settings = {"model.name": str(get_smollm2(ROOT / "models" / "smollm2")), "run.output": str(run), **few}
    trainer = HybridTrainer(config=HybridConfig.from_file(ROOT / "examples" / "reviews.yaml", settings))
    trainer.train()
    return trainer, run


def _costs(model: str, trainer: HybridTrainer, run: Path) -> dict[str, Any]:
    """Of checkpoints of the trainer, and of the steps that its run has logged."""
    steps = [row for row in read_jsonl(run / "metrics.jsonl") if row["phase"] != "eval"]
    step_s = fmean(row["seconds"] for row in steps)
    checkpoints = Checkpoints(run / "measured")
    totals, parts = [], defaultdict(list)
    # The first has none to delete and a cold disk.
    for number in range(ROUNDS + 1):
        with _timed() as seconds:
            began = time.perf_counter()
            with checkpoint_state(trainer) as state:
                saved = checkpoints.save(number, partial(write_checkpoint, trainer, state=state))
            total = time.perf_counter() - began
        if number:
            totals.append(total)
            for part in PARTS:
                parts[part].append(seconds[part])
            parts["rest"].append(total - sum(seconds.values()))
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()) / 1e6
    return {
        "model": model,
        "parameters": sum(p.numel() for p in trainer.policy.parameters()),
        "megabytes": size,
        "seconds": median(totals),
        "spread": [min(totals), max(totals)],
        "megabytes_per_second": size / median(totals),
        "parts": {part: median(seconds) for part, seconds in parts.items()},
        "step_s": step_s,
        "steps": {phase: [row["seconds"] for row in steps if row["phase"] == phase][:8] for phase in ("sft", "ppo")},
        "share": median(totals) / (CheckpointConfig().every * step_s),
    }


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Seconds by part, of all calls inside the block."""
    seconds: dict[str, float] = defaultdict(float)
    inside: list[str] = []
    last = time.perf_counter()

    def switch() -> None:
        nonlocal last
        now = time.perf_counter()
        if inside:
            seconds[inside[-1]] += now - last
        last = now

    def watched(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            switch()
            inside.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                switch()
                inside.pop()

        return call

    with ExitStack() as patches:
        for part, name in PARTS.items():
            patches.enter_context(patch(name, watched(part, resolve_name(name))))
        yield seconds


if __name__ == "__main__":
    main()
