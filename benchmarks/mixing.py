"""Does mixing help? Supervised only, PPO only, one after the other, and every mixture, for the same number of tokens.

    python benchmarks/mixing.py --jobs 2     # all tasks, arms and seeds; goes on where it was stopped
    python benchmarks/mixing.py --tasks digits --arms sequential joint --seeds 3
    python benchmarks/mixing.py --sweep      # the learning rates of sft_only and rl_only_kl, on validation data
    python benchmarks/mixing.py --quick      # to see that it runs; writes no result

Every run is on one thread of one process. A finished run stays in WORK (runs/mixing) and is not made again while its
settings are the same. Prints the table; the whole study also writes benchmarks/results/mixing-cpu-1-thread.json, .md
and .png.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

# One thread a run: two that share their cores with another run are several times slower.
if __name__ == "__main__":  # whoever imports this file keeps its own
    os.environ["OMP_NUM_THREADS"] = "1"

HERE = Path(__file__).resolve().parent
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == HERE:
    sys.path[0] = str(HERE.parent)

from benchmarks.kept import in_processes, kept  # noqa: E402
from benchmarks.mixing_report import draw, sweep_table, table  # noqa: E402
from benchmarks.mixing_run import ARMS, Lengths, arm_config, base_of, run  # noqa: E402
from benchmarks.mixing_tasks import DATA, TASKS, Pretraining, Task, prepare  # noqa: E402
from benchmarks.stamp import commit  # noqa: E402

RESULT = HERE / "results" / "mixing-cpu-1-thread.json"
# Learning rates of the sweep, for each family.
RATES = {"sft_only": (1e-4, 3e-4, 1e-3, 3e-3), "rl_only_kl": (3e-5, 1e-4, 3e-4, 1e-3)}
SWEEP_SEED = 100


@dataclass(frozen=True)
class Job:
    """One run.   lr: of a sweep, which is measured on validation data; None: the task's own, on test data."""

    work: Path
    task: str
    arm: str
    seed: int
    lr: float | None = None
    quick: bool = False

    @property
    def file(self) -> Path:
        name = f"{self.arm}-{self.seed}" if self.lr is None else f"{self.arm}-{self.lr:g}"
        return self.work / self.task / ("runs" if self.lr is None else "sweep") / f"{name}.json"


def main() -> None:
    arguments = _arguments()
    work = Path(arguments.work) / "quick" if arguments.quick else Path(arguments.work)
    bases = [_base(work, name, arguments.quick) for name in arguments.tasks]
    study = [
        Job(work, task, arm, seed, quick=arguments.quick)
        for task in arguments.tasks
        for seed in range(arguments.seeds)
        for arm in arguments.arms
    ]
    sweep = [
        Job(work, task, arm, SWEEP_SEED, lr, arguments.quick)
        for task in arguments.tasks
        for arm, rates in RATES.items()
        for lr in rates
    ]
    if arguments.sweep:
        print(sweep_table(list(_results(sweep, arguments.jobs)), {name: TASKS[name].sft_goal for name in TASKS}))
        return
    results = sorted(_results(study, arguments.jobs), key=lambda run: (list(ARMS).index(run["arm"]), run["seed"]))
    print(table(bases + results))
    whole = set(arguments.tasks) == set(TASKS) and set(arguments.arms) == set(ARMS)
    if whole and not arguments.quick:
        done = [json.loads(job.file.read_text(encoding="utf-8")) for job in sweep if job.file.is_file()]
        _write(bases, results, done)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, of one thread each")
    parser.add_argument("--work", default="runs/mixing", help="folder of data, base models and finished runs")
    parser.add_argument("--sweep", action="store_true", help="only measure the learning rates")
    parser.add_argument(
        "--quick", action="store_true", help="a 20th of the budget, and of the base model's training; writes no result"
    )
    arguments = parser.parse_args()
    if "films" in arguments.tasks and not DATA.is_dir():
        parser.error(f"task films reads the data in {DATA}, which is not there; leave it out with --tasks")
    return arguments


def _task(name: str, quick: bool) -> Task:
    task = TASKS[name]
    if not quick:
        return task
    base = replace(task.base, steps=20) if isinstance(task.base, Pretraining) else task.base
    return replace(task, budget=task.budget // 20, base=base)


def _base(work: Path, name: str, quick: bool) -> dict[str, Any]:
    """The base model's row of the table, and the lengths that all runs of the task are laid out by."""
    task = _task(name, quick)
    about = {"budget": task.budget, "pretraining": repr(task.base), "settings": repr(task.settings)}

    def made() -> dict[str, Any]:
        return {"task": name, "arm": "base", "seed": 0, **base_of(task, prepare(task, work / name))}

    return kept(work / name / "base.json", about, made)


def _results(jobs: Sequence[Job], processes: int) -> Iterator[dict[str, Any]]:
    """The results, in order of completion, with a line for each on the console."""
    for number, result in in_processes(_result, jobs, processes):
        metrics = result["metrics"]
        print(
            f"{number}/{len(jobs)} {result['task']} {result['arm']} {result['lr'] or 'seed'} {result['seed']}: "
            f"reward {metrics['reward']:.3f}, SFT loss {metrics['sft_loss']:.3f}, {result['cpu_seconds']:.0f} s",
            file=sys.stderr,
        )
        yield result


def _result(job: Job) -> dict[str, Any]:
    """Of a finished run of the same settings, or of a new one."""
    task, base = _task(job.task, job.quick), _base(job.work, job.task, job.quick)
    work = prepare(task, job.work / job.task)
    config = arm_config(task, work, job.arm, Lengths(**base["lengths"]), seed=job.seed, lr=job.lr)
    about = {"config": config.written(), "base": base["metrics"], "budget": task.budget}

    def made() -> dict[str, Any]:
        named = {"task": job.task, "arm": job.arm, "seed": job.seed, "lr": job.lr, "commit": commit()}
        return named | run(task, config)

    return kept(job.file, about, made)


def _write(bases: list[dict[str, Any]], runs: list[dict[str, Any]], sweep: list[dict[str, Any]]) -> None:
    tasks = {}
    for base in bases:
        task, config = base["task"], next(run["config"] for run in runs if run["task"] == base["task"])
        shared = {name: config[name] for name in ("data", "sampling", "ppo", "kl", "reward")}
        tasks[task] = {"about": TASKS[task].about, "settings": shared, **base}
    result = {
        "benchmark": "mixing",
        "commits": sorted({run["commit"] for run in runs}),
        "device": f"{platform.machine()} cpu, 1 thread a run",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "transformers", "vaderSentiment")},
        "tasks": tasks,
        "runs": [_without_config(run) for run in runs],
        "learning_rate_sweep": [_without_config(run) for run in sweep],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    RESULT.with_suffix(".md").write_text(table(bases + runs) + "\n", encoding="utf-8")
    draw(bases + runs, {name: task["about"] for name, task in tasks.items()}, RESULT.with_suffix(".png"))
    print(f"wrote {RESULT.relative_to(HERE.parent)}, .md and .png", file=sys.stderr)


def _without_config(run: dict[str, Any]) -> dict[str, Any]:
    """A run, with what is its own of the config."""
    config = run["config"]
    own = {name: config[name] for name in ("mixing", "sft", "optimizer")}
    return {name: value for name, value in run.items() if name not in ("config", "base", "budget")} | own


if __name__ == "__main__":
    main()
