"""Does a memory beside the cell generalise where the bare cell does not? Copying and associative recall, past training.

    python benchmarks/recurrent.py             # both tasks, both arms, 3 seeds; about ten minutes of one core
    python benchmarks/recurrent.py --quick     # to see that it runs; writes no result

    copy      <s> a b c d : a b c d           the second half is trained
    recall    <s> k v k' v' : k' v' k' v' …   6 times one of the pairs is asked for; the values are trained

Trained on 1 to L items a row, tested on L and more. Measured is the share of trained tokens whose likeliest is right,
each read behind the right ones before it, and the share of rows in which all are. Prints the table; the whole study
also writes benchmarks/results/recurrent-cpu-1-threads.json and .png.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

if __name__ == "__main__":  # whoever imports this file keeps its own
    os.environ["OMP_NUM_THREADS"] = "1"

HERE = Path(__file__).resolve().parent
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == HERE:
    sys.path[0] = str(HERE.parent)

import torch  # noqa: E402

from benchmarks.stamp import device_name, stamp  # noqa: E402
from hybrid.core import IGNORE, Encoded  # noqa: E402
from hybrid.data import collate  # noqa: E402
from hybrid.models import Policy  # noqa: E402
from hybrid.objectives import SFTConfig, sft_batch_loss  # noqa: E402

START, THEN = 1, 2  # 0 is padding
SYMBOLS = range(3, 11)
KEYS, VALUES = range(3, 19), range(19, 27)
NUM_ASKED = 6
VOCABULARY = 27


@dataclass(frozen=True)
class Task:
    """trained: items of a row at most.   tested: items of the rows that it is measured on.   slots: of the memory."""

    name: str
    trained: int
    tested: tuple[int, ...]
    slots: int

    def row(self, num_items: int, rng: random.Random) -> Encoded:
        """One row of so many items."""
        if self.name == "copy":
            items = [rng.choice(SYMBOLS) for _ in range(num_items)]
            ids, labels = [START, *items, THEN, *items], [IGNORE] * (num_items + 2) + items
        else:
            keys = rng.sample(KEYS, num_items)
            pairs = [(key, rng.choice(VALUES)) for key in keys]
            asked = [rng.choice(pairs) for _ in range(NUM_ASKED)]
            told, then = ([token for pair in of for token in pair] for of in (pairs, asked))
            ids = [START, *told, THEN, *then]
            labels = [IGNORE] * (2 * num_items + 2) + [label for _, value in asked for label in (IGNORE, value)]
        return Encoded(tuple(ids), tuple(labels), tuple(ids[:1]), "", "", {})


@dataclass(frozen=True)
class Arm:
    """A model and how it is trained."""

    name: str
    hidden_size: int
    lr: float
    updates: int
    slots: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # of RecurrentConfig


TASKS = {
    "copy": Task("copy", 8, (8, 12, 16, 24, 32), 72),
    "recall": Task("recall", 6, (6, 8, 10, 12, 16), 72),
}
ARMS = {
    "copy": (
        Arm("lstm", 128, 3e-3, 4000),
        Arm("slots", 32, 1e-2, 600, True, {"memory_width": 12, "initializer_range": 0.6}),
    ),
    "recall": (
        Arm("lstm", 128, 3e-3, 4000),
        Arm("slots", 32, 1e-2, 300, True, {"memory_width": 20, "initializer_range": 0.6}),
    ),
}
BATCH, TEST_ROWS = 16, 200


def made(task: Task, arm: Arm, seed: int) -> Policy:
    """The arm's policy, with weights drawn from the seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "hybrid_recurrent", vocab_size=VOCABULARY, hidden_size=arm.hidden_size,
        memory_slots=task.slots if arm.slots else 0, **arm.settings,
    )  # fmt: skip
    return Policy(AutoModelForCausalLM.from_config(config))


def train(policy: Policy, task: Task, arm: Arm, seed: int) -> float:
    """Adam on rows of 1 to `task.trained` items; the last update's loss."""
    optimizer = torch.optim.Adam(policy.backbone.parameters(), lr=arm.lr)
    rng = random.Random(f"{task.name}/{seed}")
    for _ in range(arm.updates):
        batch = collate([task.row(rng.randint(1, task.trained), rng) for _ in range(BATCH)], pad_id=0)
        loss, _ = sft_batch_loss(policy, batch, SFTConfig())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def measured(policy: Policy, task: Task, num_items: int, rows: int = TEST_ROWS) -> dict[str, float]:
    """The share of right tokens, and of rows that are right, on rows of so many items that are always the same."""
    rng = random.Random(f"{task.name}/test/{num_items}")
    batch = collate([task.row(num_items, rng) for _ in range(rows)], pad_id=0)
    hidden = policy.backbone(batch.input_ids, batch.attention_mask)[:, :-1]
    labels = batch.labels[:, 1:]
    trained = labels != IGNORE
    right = torch.ones_like(trained)
    right[trained] = policy.backbone.logits(hidden[trained]).argmax(-1) == labels[trained]
    return {"token": float(right[trained].float().mean()), "row": float(right.all(1).float().mean())}


def run(task: Task, arm: Arm, seed: int, rows: int = TEST_ROWS) -> dict[str, Any]:
    """Train one arm with one seed and measure it."""
    began = time.perf_counter()
    policy = made(task, arm, seed)
    loss = train(policy, task, arm, seed)
    seconds = time.perf_counter() - began
    return {
        "task": task.name, "arm": arm.name, "seed": seed, "loss": loss, "seconds": seconds,
        "parameters": sum(p.numel() for p in policy.backbone.parameters()),
        "tested": {str(n): measured(policy, task, n, rows) for n in task.tested},
    }  # fmt: skip


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A line for each task and arm: right tokens at each length, mean (worst seed)."""
    lines = []
    for name, task in TASKS.items():
        for arm in ARMS[name]:
            of = [r for r in runs if (r["task"], r["arm"]) == (name, arm.name)]
            if not of:
                continue
            cells = []
            for n in of[0]["tested"]:
                shares = [r["tested"][n]["token"] for r in of]
                cells.append(f"{n}: {fmean(shares):.3f} ({min(shares):.3f})")
            size, seconds = of[0]["parameters"], fmean(r["seconds"] for r in of)
            lines.append(
                f"{name:7} {arm.name:6} {size:7,} parameters  {seconds:4.0f} s  1-{task.trained} -> {'  '.join(cells)}"
            )
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Right tokens against length, a panel a task, a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for axes, (name, task) in zip(panels, TASKS.items(), strict=True):
        for arm, color in zip(ARMS[name], ("tab:gray", "tab:blue"), strict=True):
            for number, r in enumerate(r for r in runs if (r["task"], r["arm"]) == (name, arm.name)):
                lengths = [int(n) for n in r["tested"]]
                shares = [m["token"] for m in r["tested"].values()]
                label = None if number else {"lstm": "LSTM alone", "slots": "with memory slots"}[arm.name]
                axes.plot(lengths, shares, color=color, marker="o", markersize=3, alpha=0.8, label=label)
        axes.axvline(task.trained, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(f"{name}, trained on 1 to {task.trained} items", fontsize=9)
        axes.set_xlabel("items")
        axes.set_ylim(0, 1.03)
    panels[0].set_ylabel("tokens right")
    panels[0].legend(fontsize=8, loc="lower left")
    figure.savefig(file, dpi=110)


def _one_thread() -> None:
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each of one thread")
    parser.add_argument("--quick", action="store_true", help="3 updates of each; writes nothing")
    given = parser.parse_args()
    rows, runs = 8 if given.quick else TEST_ROWS, []
    jobs = [
        (TASKS[name], replace(arm, updates=3) if given.quick else arm, seed, rows)
        for name in given.tasks
        for arm in reversed(ARMS[name])
        for seed in range(given.seeds)
    ]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        for found in pool.map(run, *zip(*jobs, strict=True)):
            runs.append(found)
            print(table(runs[-1:]), flush=True)
    print("\n" + table(runs))
    if given.quick or set(given.tasks) != set(TASKS):
        return
    settings = {
        "batch": BATCH, "test_rows": TEST_ROWS, "tasks": {name: asdict(task) for name, task in TASKS.items()},
        "arms": {name: [asdict(arm) for arm in arms] for name, arms in ARMS.items()},
    }  # fmt: skip
    _one_thread()  # as the name says
    file = HERE / "results" / f"recurrent-{device_name('cpu')}.json"
    file.write_text(json.dumps({**stamp(device="cpu"), "settings": settings, "runs": runs}, indent=1) + "\n")
    draw(runs, file.with_suffix(".png"))
    print(file)


if __name__ == "__main__":
    main()
