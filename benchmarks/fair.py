"""Does mixing SFT and RL help? Ten arms, tuned alike, at equal tokens and at equal seconds, on five questions.

    nice python benchmarks/fair.py --jobs 2                     # all of it; goes on where it was stopped
    python benchmarks/fair.py --tasks plenty --jobs 2           # one task
    python benchmarks/fair.py --report                          # the page of the tasks that are whole; no run
    python benchmarks/fair.py --again plenty luffy 3            # one cell anew, beside what is kept and its interval
    python benchmarks/fair.py --enter 'mine: {import: my_module, mixing: {strategy: mine}}'     # another arm
    python benchmarks/fair.py --quick                           # to see that it runs; writes nothing of the study

NOTES.md has the plan, which was written before the first run. Of each arm NUM_TRIALS configurations are tried with one
seed on validation data, then the best of them is run with five other seeds on test data. A finished run is kept in
benchmarks/results/fair and not made again while its settings are the same. One thread a run. Writes
results/fair-cpu-1-thread.json, docs/does-mixing-help.md and its picture, of the tasks all of whose runs are made.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

# One thread a run: two that share their cores with another run are several times slower.
if __name__ == "__main__":  # whoever imports this file keeps its own
    os.environ["OMP_NUM_THREADS"] = "1"

HERE = Path(__file__).resolve().parent
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == HERE:
    sys.path[0] = str(HERE.parent)

import yaml  # noqa: E402

from benchmarks.fair_report import ENDS, measure, table, task_result, write  # noqa: E402
from benchmarks.fair_run import ARMS, NUM_TRIALS, config_of, lengths_of, run, settings_of, trials  # noqa: E402
from benchmarks.fair_tasks import PRETRAINING, QUESTIONS, prepare  # noqa: E402
from benchmarks.kept import found, in_processes, kept  # noqa: E402
from benchmarks.stamp import commit  # noqa: E402

CELLS = HERE / "results" / "fair"
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
Result = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What a run spends: both budgets, the second after the first or the first after the second."""

    tokens: int = 30_000
    seconds: float = 5.0


@dataclass(frozen=True)
class Job:
    """One run.   part: validation, while an arm is tuned, or test.   entered: the arm's sections as JSON, if it is none
    of ARMS.   cells: the folder of finished runs; work: of data and base models."""

    task: str
    arm: str
    trial: int
    seed: int
    part: str
    cells: Path
    work: Path
    size: Size = Size()
    entered: str = ""

    @property
    def file(self) -> Path:
        name = f"trial-{self.trial}" if self.part == "validation" else f"seed-{self.seed}"
        return self.cells / self.task / f"{self.arm}-{name}.json"

    def about(self) -> Result:
        """All that the run depends on, in the types of JSON."""
        trial = trials()[self.trial]
        lengths = lengths_of(self.task, self.size.tokens)
        own = json.loads(self.entered) if self.entered else ARMS[self.arm](lengths, trial)
        about = {
            "task": self.task, "arm": self.arm, "part": self.part, "seed": self.seed, "trial": self.trial,
            **asdict(self.size), "drawn": asdict(trial), "module": own.pop("import", None),
            "settings": settings_of(own, trial), "base": repr(PRETRAINING),
        }  # fmt: skip
        in_json: Result = json.loads(json.dumps(about))
        return in_json


def made(job: Job) -> Result:
    """A finished run of the same settings, or a new one."""
    about = job.about()

    def new() -> Result:
        if about["module"]:
            importlib.import_module(about["module"])
        config = config_of(about["settings"], prepare(job.task, job.work), part=job.part, seed=job.seed)
        return {"commit": commit(), **run(config, tokens=job.size.tokens, seconds=job.size.seconds)}

    return kept(job.file, about, new)


def measures(result: Result) -> dict[str, float]:
    """What the task is judged by, at the end of each budget."""
    curve = result["curve"]
    return {end: measure(result["task"], curve[result["at"][end]], curve[0]) for end in ENDS}


def study(task: str, arms: Mapping[str, str], options: argparse.Namespace) -> tuple[list[Result], list[Result], int]:
    """A task's runs: of each arm's configurations, of the seeds of the best one; and how many are not there."""
    work = Path(options.work) / ("quick" if options.quick else "study")
    cells, size = (work / "cells", Size(1_000, 0.0)) if options.quick else (CELLS, Size())

    def job(arm: str, trial: int, seed: int, part: str) -> Job:
        # Only the study's own runs are committed.
        folder = work / "entered" if arms[arm] else cells
        return Job(task, arm, trial, seed, part, folder, work, size, arms[arm])

    seeds = SEEDS[:2] if options.quick else SEEDS
    expected = len(arms) * (NUM_TRIALS + len(seeds))
    tried = _results([job(arm, i, TUNING_SEED, "validation") for arm in arms for i in range(NUM_TRIALS)], options)
    if len(tried) < len(arms) * NUM_TRIALS:
        return tried, [], expected - len(tried)
    best = {arm: max((r for r in tried if r["arm"] == arm), key=lambda r: fmean(measures(r).values())) for arm in arms}
    # One seed of every arm before the next: what is there when time ends compares all arms.
    runs = _results([job(arm, best[arm]["trial"], seed, "test") for seed in seeds for arm in arms], options)
    return tried, runs, expected - len(tried) - len(runs)


def _results(jobs: Sequence[Job], options: argparse.Namespace) -> list[Result]:
    """In the order of the jobs; each that is made has a line on the console. With --report, those that are there."""
    missing = [job for job in jobs if found(job.file, job.about()) is None]
    if missing and not options.report:
        # The base model is made once, before two processes want it.
        prepare(missing[0].task, missing[0].work)
        for number, result in in_processes(made, missing, options.jobs):
            said = ", ".join(f"{x:.3f} at equal {end}" for end, x in measures(result).items())
            name = f"trial {result['trial']}" if result["part"] == "validation" else f"seed {result['seed']}"
            print(
                f"{number}/{len(missing)} {result['task']} {result['arm']} {name}: {said}", file=sys.stderr, flush=True
            )
    there = (found(job.file, job.about()) for job in jobs)
    return [result for result in there if result is not None]


def again(task: str, arm: str, seed: int, options: argparse.Namespace) -> None:
    """Make one cell anew and print it beside what is kept."""
    options.report = True
    runs = {run["seed"]: run for run in study(task, {arm: ""}, options)[1]}
    with TemporaryDirectory() as folder:
        work = Path(options.work) / "study"
        new = made(Job(task, arm, runs[seed]["trial"], seed, "test", Path(folder), work))
    for end in ENDS:
        of_seeds = sorted(measures(run)[end] for run in runs.values())
        print(
            f"equal {end}: kept {measures(runs[seed])[end]:.3f}, now {measures(new)[end]:.3f}; "
            f"the arm's seeds {of_seeds[0]:.3f} to {of_seeds[-1]:.3f}"
        )


def main() -> None:
    options = _options()
    if options.again:
        task, arm, seed = options.again
        return again(task, arm, int(seed), options)
    entered = {arm: json.dumps(own) for line in options.enter for arm, own in yaml.safe_load(line).items()}
    tasks, missing, commits = {}, {}, set()
    for task in options.tasks:
        tried, runs, missing[task] = study(task, dict.fromkeys(options.arms, "") | entered, options)
        if not missing[task]:
            tasks[task] = task_result(task, tried, runs)
            commits |= {run["commit"] for run in (*tried, *runs)}
            print(f"{task}: {tasks[task]['about']}\n\n{table(tasks[task])}\n")
    print("\n".join(f"{task}: {count} runs are not made yet" for task, count in missing.items() if count))
    if not options.quick and not entered and set(options.arms) == set(ARMS) and set(options.tasks) == set(QUESTIONS):
        about = {"commits": sorted(commits), "missing": missing, **asdict(Size()), "trials": NUM_TRIALS}
        write(tasks, about, HERE / "results" / "fair-cpu-1-thread.json", HERE.parent / "docs" / "does-mixing-help.md")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, of one thread each")
    parser.add_argument("--work", default="runs/fair", help="folder of data and base models")
    parser.add_argument("--report", action="store_true", help="of what is there, without a run")
    parser.add_argument("--again", nargs=3, metavar=("TASK", "ARM", "SEED"), help="make one kept run anew")
    parser.add_argument("--enter", nargs="+", default=[], metavar="ARM", help="'name: {mixing: {strategy: ...}}'")
    parser.add_argument("--quick", action="store_true", help="a 30th of the tokens, two seeds; writes no result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
