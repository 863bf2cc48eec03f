"""Does a memory help? One PPO run on digits of mixed difficulty for each way of choosing its prompts, at equal tokens.

    nice python benchmarks/memory.py            # all arms and seeds; goes on where it was stopped
    python benchmarks/memory.py --arms uniform learnability --seeds 1
    python benchmarks/memory.py --report        # of what is there, without a run
    python benchmarks/memory.py --quick         # to see that it runs; writes no result

The task: sort 3 to 8 digits; reward 1 for the exact answer. Every run begins with the same policy: the base model
of `mixing.py`'s digits, which can sort strings of 2 to 4, after START_STEPS of SFT on demonstrations that are right for
the share RIGHT of each length, and copy the digits unsorted else. So it has two habits, and how often the right one is
its first choice depends on the length. Then PPO alone, its prompts chosen by the arm, to the end of BUDGET tokens
(`Metered.spent`). One thread a run. Writes benchmarks/results/memory-cpu-1-thread.json and .md.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

# One thread a run: two that share their cores with another run are several times slower.
if __name__ == "__main__":  # whoever imports this file keeps its own
    os.environ["OMP_NUM_THREADS"] = "1"

HERE = Path(__file__).resolve().parent
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == HERE:
    sys.path[0] = str(HERE.parent)

from benchmarks.mixing_report import interval  # noqa: E402
from benchmarks.mixing_run import Metered, until  # noqa: E402
from benchmarks.mixing_tasks import SEED, TASKS, Pretraining, Work, prepare  # noqa: E402
from benchmarks.stamp import stamp  # noqa: E402
from hybrid import HybridConfig, HybridTrainer  # noqa: E402
from hybrid.data import read_rows  # noqa: E402
from hybrid.mixing import make_strategy  # noqa: E402

RESULT = HERE / "results" / "memory-cpu-1-thread.json"
START_STEPS, SFT_LR = 150, 1e-3
PPO_LR = 4e-4  # 2e-4 learnt a little slower, and with twice the epochs or minibatches both were unsteady
RIGHT = {3: 0.8, 4: 0.65, 5: 0.5, 6: 0.35, 7: 0.2, 8: 0.1}
BUDGET = 100_000
EVERY = 8  # steps between evaluations
NUM_PROMPTS = 240  # of each
LIMIT = 300  # training prompts
GAIN = 0.10  # of the reward on test prompts over the start's: the threshold that tokens are counted to

PPO = {"batch_size": 16, "samples_per_prompt": 4, "minibatch_size": 64, "epochs": 1, "advantage": "leave_one_out"}
# A pass over all prompts first would be as long as half of the run.
EXPERIENCE = {"type": "experience", "unseen": 0.25}
WATCHES = {"type": "experience", "uniform": 1.0}
LENGTHS = {"clusters": 6, "embedder": "benchmarks.memory:lengths_of"}
ARMS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "classes": {"memory": {**EXPERIENCE, "choose": "classes"}},
    "quantiles": {"memory": {**EXPERIENCE, "choose": "classes", "by": "quantile"}},
    "learnability": {"memory": {**EXPERIENCE, "choose": "learnability"}},
    "markov": {"memory": {"type": "markov"}},
    "progress": {"memory": {"type": "markov", "prefer": "progress"}},
    # States are the six lengths: of single prompts the chain has 90,000 pairs, of which a run follows 1,300.
    "lengths": {"memory": {"type": "markov", **LENGTHS}},
    "lengths_progress": {"memory": {"type": "markov", "prefer": "progress", **LENGTHS}},
    "leitner": {"memory": {**EXPERIENCE, "choose": "due", "interval": 4.0}},
    "fsrs": {"memory": {**EXPERIENCE, "choose": "due", "scheduler": "fsrs", "interval": 1.0}},
    # What is learnt from again, with prompts as `uniform` has them.
    "stale": {"memory": {**WATCHES, "staleness": 4}, "ppo": {"importance": "token"}},
    "replay": {"memory": WATCHES, "mixing": {"coefs": {"ppo": 1.0, "replay": 0.1}}},
}


def lengths_of(prompts: Sequence[str]) -> list[list[float]]:
    """What the arms of lengths take for an embedder: how many digits."""
    return [[float(len(prompt.rstrip(">")))] for prompt in prompts]


class Watched(Metered):
    """A metered trainer that notes the reward at every evaluation, by the prompts' lengths."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.curve: list[dict[str, float]] = []

    def evaluation(self) -> Any:
        found = super().evaluation()
        rewards: dict[int, list[float]] = {}
        for row in found[1]:
            rewards.setdefault(len(row["prompt"].rstrip(">")), []).append(row["reward"])
        by_length = {str(length): fmean(rewards[length]) for length in sorted(rewards)}
        self.curve.append({"tokens": self.spent, "reward": found[0]["reward"], **by_length})
        return found


def started(work: Work, folder: Path, steps: int) -> Path:
    """The policy that every run begins with, made where it is not there yet."""
    start, file = folder / f"start-{steps}", folder / "demonstrations.jsonl"
    if not start.is_dir():
        chance = random.Random(SEED)
        lines = []
        for row in read_rows(work.files["train"]):
            digits = row["prompt"].rstrip(">")
            right = chance.random() < RIGHT[len(digits)]
            lines.append(json.dumps({"prompt": row["prompt"], "target": row["target"] if right else digits}) + "\n")
        file.write_text("".join(lines), encoding="utf-8")
        task = TASKS["digits"]
        config = HybridConfig.from_dict(
            {
                "model": {"name": str(work.base)},
                "data": {**task.settings["data"], "train": str(file)},
                "mixing": {"strategy": "sequential", "sft_steps": steps, "ppo_steps": 0},
                "sft": task.settings["sft"],
                "optimizer": {"name": "adamw", "lr": SFT_LR},
            }
        )
        trainer = HybridTrainer(config=config)
        with redirect_stdout(StringIO()):
            trainer.train()
        trainer.save(start)
    return start


def config_of(arm: str, seed: int, start: Path, work: Work, lr: float) -> HybridConfig:
    task, own = TASKS["digits"], ARMS[arm]
    return HybridConfig.from_dict(
        {
            "model": {"name": str(start)},
            "data": {
                **task.settings["data"],
                "train": work.files["train"],
                "eval": work.files["test"],
                "limit": LIMIT,
            },
            "reward": task.settings["reward"],
            "sampling": task.settings["sampling"],
            "mixing": {"strategy": "blend", "coefs": {"ppo": 1.0}, "steps": 10_000, **own.get("mixing", {})},
            "memory": own.get("memory", {}),
            "ppo": {**PPO, **own.get("ppo", {})},
            "kl": {"coef": 0.0},
            "optimizer": {"name": "adamw", "lr": lr},
            "eval": {"every": EVERY, "num_prompts": NUM_PROMPTS, "num_examples": 1, "batch_size": 120},
            "run": {"seed": seed},
        }
    )


def run(config: HybridConfig, budget: int) -> dict[str, Any]:
    """Train to the end of the budget: the rewards on the way, and which prompts were chosen."""
    trainer = Watched(config=config)
    trainer.strategy = until(make_strategy(config.mixing), lambda: trainer.spent, budget)
    lengths: dict[int, int] = {}
    rollout = trainer.rollout

    def counted(prompts: Any) -> Any:
        for example in prompts:
            length = len(example.prompt.rstrip(">"))
            lengths[length] = lengths.get(length, 0) + 1
        return rollout(prompts)

    trainer.rollout = counted  # type: ignore[method-assign]
    cpu = time.process_time()
    with redirect_stdout(StringIO()):
        trainer.train()
    total = sum(lengths.values())
    return {
        "curve": trainer.curve,
        "steps": trainer.num_steps,
        "chosen": {str(length): lengths[length] / total for length in sorted(lengths)},
        "memory": {} if trainer.memory is None else trainer.memory.metrics(),
        "cpu_seconds": time.process_time() - cpu,
    }


def measures(result: Mapping[str, Any]) -> dict[str, float]:
    """What the table has of a run.

    reward: the mean of the last three evaluations.   hard: of prompts of 6 digits and more.
    tokens: to the threshold, the budget where it was not reached.   forgetting: what prompts of 3 and 4 digits lost
        from their best evaluation to the last three.
    """
    curve = result["curve"]
    last = curve[-3:]
    threshold = curve[0]["reward"] + GAIN

    def mean(row: Mapping[str, float], lengths: Sequence[int]) -> float:
        return fmean(row[str(length)] for length in lengths if str(length) in row)

    return {
        "reward": fmean(row["reward"] for row in last),
        "hard": fmean(mean(row, (6, 7, 8)) for row in last),
        "tokens": next((row["tokens"] for row in curve if row["reward"] >= threshold), result["budget"]),
        "forgetting": max(mean(row, (3, 4)) for row in curve) - fmean(mean(row, (3, 4)) for row in last),
    }


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line for each arm: means and 95 % intervals over the seeds, and the difference to uniform of the same seeds."""
    lines = [
        "| prompts | seeds | reward | over uniform | 6 to 8 digits | 1000 tokens to goal | forgetting | 6-8 chosen |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    of = {(run["arm"], run["seed"]): measures(run) for run in runs}
    for arm in ARMS:
        seeds = sorted(seed for name, seed in of if name == arm)
        if not seeds:
            continue
        found = [of[arm, seed] for seed in seeds]
        pairs = [of[arm, s]["reward"] - of["uniform", s]["reward"] for s in seeds if ("uniform", s) in of]
        chosen = fmean(
            sum(share for length, share in run["chosen"].items() if int(length) >= 6)
            for run in runs
            if run["arm"] == arm
        )
        tokens = [x["tokens"] / 1000 for x in found]
        cells = [
            arm,
            str(len(seeds)),
            _shown([x["reward"] for x in found]),
            "" if arm == "uniform" else _shown(pairs, "+"),
            _shown([x["hard"] for x in found]),
            f"{fmean(tokens):.0f}" + (f" ({sum(x['tokens'] >= r['budget'] for x, r in _of(arm, runs, of))} never)"),
            _shown([x["forgetting"] for x in found]),
            f"{chosen:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _of(arm: str, runs: Sequence[Mapping[str, Any]], of: Mapping[Any, dict[str, float]]) -> list[tuple[Any, Any]]:
    return [(of[arm, run["seed"]], run) for run in runs if run["arm"] == arm]


def _shown(values: Sequence[float], sign: str = "") -> str:
    if len(values) < 2:
        return format(values[0], f"{sign}.3f") if values else ""
    mean, half = interval(values)
    return f"{mean:{sign}.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm")
    parser.add_argument("--lr", type=float, default=PPO_LR, help="another one than the study's writes no result")
    parser.add_argument("--work", default="runs/memory", help="folder of data, models and finished runs")
    parser.add_argument("--report", action="store_true", help="only the table of what is there")
    parser.add_argument("--quick", action="store_true", help="a 20th of the budget, a small base; writes no result")
    arguments = parser.parse_args()
    folder = Path(arguments.work) / ("quick" if arguments.quick else "study")
    budget, steps = (BUDGET // 20, 10) if arguments.quick else (BUDGET, START_STEPS)
    task = TASKS["digits"]
    if arguments.quick:
        task = replace(task, base=Pretraining(vocab_size=259, steps=20))
    work = prepare(task, folder)
    start = started(work, folder, steps)
    runs = []
    for seed in range(arguments.seeds):
        for arm in arguments.arms:
            config = config_of(arm, seed, start, work, arguments.lr)
            file = folder / f"runs-{arguments.lr:g}" / f"{arm}-{seed}.json"
            about = {"arm": arm, "seed": seed, "budget": budget, "config": config.written()}
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if any(found.get(name) != value for name, value in about.items()):
                if arguments.report:
                    continue
                found = {**about, "commit": stamp()["commit"], **run(config, budget)}
                file.parent.mkdir(parents=True, exist_ok=True)
                # Whole or not at all: the next start trusts what it finds.
                file.with_suffix(".tmp").write_text(json.dumps(found) + "\n", encoding="utf-8")
                file.with_suffix(".tmp").replace(file)
                said = {name: round(value, 3) for name, value in measures(found).items()}
                print(f"{arm} seed {seed}: {said}, {found['cpu_seconds']:.0f} s", file=sys.stderr, flush=True)
            runs.append(found)
    print(table(runs))
    if not arguments.quick and arguments.lr == PPO_LR:
        settings = {"ppo": PPO, "lr": PPO_LR, "budget": BUDGET, "start_steps": START_STEPS, "arms": ARMS}
        kept = [{name: x for name, x in found.items() if name != "config"} for found in runs]
        result = {
            **stamp("fsrs"),
            "benchmark": "memory",
            "device": "cpu, 1 thread a run",
            "settings": settings,
            "runs": kept,
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        RESULT.with_suffix(".md").write_text(table(runs) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
