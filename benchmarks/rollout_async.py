"""What `rollout.staleness` costs and gains: wall time a token, and the reward after equal samples, for each k.

    python benchmarks/rollout_async.py          # 3 x 2 runs of 16 rollouts of 64 x 44 tokens, one thread a process

The demo's small model is taught its language once; each run then learns from as many rollouts by PPO. The runs of one
seed follow each other, all k in turn. The first rollout, in which the actor starts, is not in the time.
Prints one table, and writes benchmarks/results/rollout_async-DEVICE.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":
    sys.path[0] = str(ROOT)

from benchmarks.kernels import table  # noqa: E402
from benchmarks.stamp import stamp  # noqa: E402
from hybrid import HybridConfig, HybridTrainer, Policy  # noqa: E402
from hybrid.demo.corpus import reviews  # noqa: E402
from hybrid.demo.model import demo_model, demo_tokenizer  # noqa: E402
from hybrid.run import read_jsonl  # noqa: E402

NUM_REVIEWS, SFT_STEPS = 2000, 200
STALENESS = (0, 1, 2)
COLUMNS = [
    "staleness",
    "ms a token",
    "fastest",
    "slowest",
    "reward",
    "sem",
    "before",
    "gap",
    "learner idle",
    "actor idle",
]
COMMON: dict[str, Any] = {
    "data": {"template": "none", "eval_fraction": 0.1},
    "sampling": {"max_new_tokens": 44},
    "eval": {"num_prompts": 200, "num_examples": 200, "batch_size": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        taught(folder)
        runs = [run(folder, k, seed, arguments.rollouts) for seed in arguments.seeds for k in STALENESS]
    rows = [summary([run for run in runs if run["staleness"] == k]) for k in STALENESS]
    print(table(rows, COLUMNS))
    about = {"benchmark": "rollout_async", **stamp(), "threads": "1 a process", "seeds": arguments.seeds}
    file = arguments.output / f"rollout_async-{about['device']}.json"
    file.write_text(json.dumps({**about, "rollouts": arguments.rollouts, "rows": rows, "runs": runs}, indent=1) + "\n")
    print(f"wrote {file}")


def taught(folder: Path) -> None:
    """The model and its data, in the folder."""
    rows = reviews(NUM_REVIEWS, seed=0)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = demo_tokenizer(row["prompt"] + row["target"] for row in rows)
    plan = {"mixing": {"strategy": "sequential", "sft_steps": SFT_STEPS, "ppo_steps": 0}, "optimizer": {"lr": 2e-3}}
    config = HybridConfig.from_dict({**COMMON, **plan, "sft": {"batch_size": 32}})
    trainer = HybridTrainer(
        Policy(demo_model(tokenizer, seed=0)), tokenizer, train_data=str(folder / "data.jsonl"), config=config
    )
    with redirect_stdout(StringIO()):
        trainer.train()
    trainer.save(folder / "model")


def run(folder: Path, staleness: int, seed: int, num_rollouts: int) -> dict[str, Any]:
    """What one run took and came to."""
    output = folder / f"run-{staleness}-{seed}"
    config = HybridConfig.from_dict(
        {
            **COMMON,
            "model": {"name": str(folder / "model")},
            "reward": {"type": "sentiment_lexicon"},
            "rollout": {"staleness": staleness},
            "mixing": {"strategy": "sequential", "sft_steps": 0, "ppo_steps": num_rollouts},
            "ppo": {"batch_size": 64, "minibatch_size": 16, "epochs": 1},
            "kl": {"coef": 0.08},
            "optimizer": {"lr": 6e-4},
            "checkpoint": {"every": 0},
            "run": {"output": str(output), "seed": seed},
        },
        {"data.train": str(folder / "data.jsonl")},
    )
    with redirect_stdout(StringIO()):
        HybridTrainer(config=config).train()
    rows = list(read_jsonl(output / "metrics.jsonl"))
    first, last = (row for row in rows if row["phase"] == "eval")
    steps = [row for row in rows if row["phase"] == "ppo"][1:]
    return {
        "staleness": staleness,
        "seed": seed,
        "ms_a_token": [1000 * row["seconds"] / (64 * row["response_length"]) for row in steps],
        "reward_before": first["reward"],
        "reward": last["reward"],
        "reward_sem": last["reward_sem"],
        "kl": last["kl"],
        "sampling_gap": fmean(row["sampling_gap"] for row in steps),
        "learner_idle": fmean(row.get("learner_idle", 0.0) for row in steps),
        "actor_idle": fmean(row.get("actor_idle", 0.0) for row in steps),
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One k, over its seeds: medians of the steps' times, means of all else."""
    times = [time for run in runs for time in run["ms_a_token"]]
    mean = {name: fmean(run[name] for run in runs) for name in runs[0] if name not in ("ms_a_token", "seed")}
    return {
        "staleness": runs[0]["staleness"], "ms a token": median(times), "fastest": min(times), "slowest": max(times),
        "reward": mean["reward"], "sem": mean["reward_sem"], "before": mean["reward_before"],
        "gap": mean["sampling_gap"], "learner idle": mean["learner_idle"], "actor idle": mean["actor_idle"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
