"""Learning from preferences: how far each way gets in what was meant, and when it is more of the judge's than of that.

    python benchmarks/preferences.py --sweep      # the learning rates, on validation data
    python benchmarks/preferences.py --jobs 2     # all arms and seeds; goes on where it was stopped
    python benchmarks/preferences.py --quick      # to see that it runs; writes no result

The base model of the mixing study's reviews answers their prompts twice; VADER, the gold reward, prefers one of the
answers, and a tenth of the labels is wrong. Every arm is trained on the same number of tokens, and measured on its way.
Every run is on one thread of one process. A finished run stays in WORK (runs/preferences) and is not made again while
its settings are the same. Prints the tables; the whole study also writes benchmarks/results/preferences-cpu.json and
.md, and docs/preferences.png.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
from benchmarks.preferences_hh import FILE, reward_model_on_hh  # noqa: E402
from benchmarks.preferences_pairs import Prepared, Size, preferences  # noqa: E402
from benchmarks.preferences_report import draw, hh_table, judge_table, sweep_table, table  # noqa: E402
from benchmarks.preferences_run import (  # noqa: E402
    ARMS,
    MEMBERS,
    RATES,
    arm_config,
    judge_config,
    judge_of,
    rate_of,
    run,
    train_judge,
)
from benchmarks.stamp import commit, stamp  # noqa: E402

RESULT, PICTURE = HERE / "results" / "preferences-cpu.json", HERE.parent / "docs" / "preferences.png"
SWEEP_SEED, SWEPT = 100, (3e-5, 1e-4, 3e-4)
QUICK = Size(budget=2_500, points=(0.5,), steps=20, prompts=12, pairs_per_prompt=4)
Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run.   arm: or a kind of reward model, of which a seed may have several, `member`s.

    lr: of the sweep; None: the arm's own.   judges: folders of the reward models, which are there by then.
    """

    size: Size
    work: Path
    prepared: Prepared
    arm: str
    seed: int
    member: int = 0
    lr: float | None = None
    judges: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}-{self.member}" if self.lr is None else f"{self.arm}-{self.lr:g}"


def main() -> None:
    arguments = _arguments()
    size, work = (QUICK, Path(arguments.work) / "quick") if arguments.quick else (Size(), Path(arguments.work))
    if arguments.sweep:
        print(sweep_table(_sweep(size, work, arguments.arms, arguments.jobs)))
        return
    prepared = {seed: preferences(size, work, seed, part="test") for seed in range(arguments.seeds)}
    judges = _results(
        [
            Job(size, work, of_seed, kind, seed, member)
            for kind in dict.fromkeys(judge_of(arm) for arm in arguments.arms)
            for seed, of_seed in prepared.items()
            for member in range(MEMBERS[kind])
        ],
        arguments.jobs,
    )
    folders: dict[tuple[int, str], list[Path]] = {}
    for judge in judges:
        folders.setdefault((judge["seed"], judge["arm"]), []).append(Path(judge["folder"]))
    runs = _results(
        [
            Job(size, work, of_seed, arm, seed, judges=tuple(folders[seed, judge_of(arm)]))
            for seed, of_seed in prepared.items()
            for arm in arguments.arms
        ],
        arguments.jobs,
    )
    hh = None if arguments.quick or not FILE.is_file() else reward_model_on_hh(work, arguments.hh_model)
    text = "\n\n".join([judge_table(judges), *([] if hh is None else [hh_table(hh)]), table(runs)])
    if set(arguments.arms) == set(ARMS) and hh is not None:
        _write(size, work, prepared, judges, runs, hh)
        RESULT.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        draw(runs, PICTURE)
        print(f"wrote {RESULT.relative_to(HERE.parent)}, .md and {PICTURE.relative_to(HERE.parent)}", file=sys.stderr)
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm, each on pairs of its own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, of one thread each")
    parser.add_argument("--work", default="runs/preferences", help="folder of data, models and finished runs")
    parser.add_argument("--hh-model", type=Path, help="folder of SmolLM2-135M; None: models/smollm2, made from PyPI's")
    parser.add_argument("--sweep", action="store_true", help="only measure the learning rates")
    parser.add_argument("--quick", action="store_true", help="a 40th of the budget; writes no result")
    return parser.parse_args()


def _sweep(size: Size, work: Path, arms: Sequence[str], processes: int) -> list[Result]:
    """Every learning rate of every arm for one seed, all by the reward model that was the best of its own."""
    prepared = preferences(size, work, SWEEP_SEED, part="validation")
    judges = _results([Job(size, work, prepared, "reward_model", SWEEP_SEED, lr=lr) for lr in SWEPT], processes)
    best = max(judges, key=lambda judge: judge["metrics"]["accuracy"])
    swept = [arm for arm in arms if arm in RATES]
    runs = _results(
        [
            Job(replace(size, points=()), work, prepared, arm, SWEEP_SEED, lr=lr, judges=(Path(best["folder"]),))
            for arm in swept
            for lr in SWEPT
        ],
        processes,
    )
    results = [*judges, *runs]
    (work / "sweep.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    return results


def _results(jobs: Sequence[Job], processes: int) -> list[Result]:
    """In the order of the jobs, with a line for each on the console as it is made."""
    results = {}
    for number, result in in_processes(_result, jobs, processes):
        results[result["name"]] = result
        end = result.get("metrics") or result["curve"][-1]
        said = ", ".join(f"{name} {end[name]:.3f}" for name in ("accuracy", "gold", "judge", "kl") if name in end)
        print(f"{number}/{len(jobs)} {result['name']}: {said}, {result['cpu_seconds']:.0f} s", file=sys.stderr)
    return [results[job.name] for job in jobs]


def _result(job: Job) -> Result:
    """Of a finished run of the same settings, or of a new one."""
    named = {"name": job.name, "arm": job.arm, "seed": job.seed, "lr": rate_of(job.arm) if job.lr is None else job.lr}
    if job.arm.startswith("reward_model"):
        # Seeds of the members that no other seed of the study has.
        seed, output = job.seed + 1000 * job.member, job.work / "judges" / job.name
        config = judge_config(job.arm, job.prepared, output, seed=seed, lr=job.lr)
        share = job.size.few_share if job.arm.endswith("few") else 1.0
        return {**train_judge(config, round(share * job.size.budget)), **named, "member": job.member}
    config = arm_config(job.arm, job.prepared, job.judges, seed=job.seed, lr=job.lr)
    about = {"config": config.written(), "budget": job.size.budget, "points": list(job.size.points)}

    def made() -> Result:
        return {**named, "commit": commit(), **run(job.size, config, job.judges[0])}

    return kept(job.work / "runs" / f"{job.name}.json", about, made)


def _write(
    size: Size, work: Path, prepared: dict[int, Prepared], judges: list[Result], runs: list[Result], hh: Result
) -> None:
    sweep = work / "sweep.json"
    made = stamp("vaderSentiment", "peft", device="cpu")
    result = {
        "benchmark": "preferences",
        "commits": sorted({run["commit"] for run in (*judges, *runs, hh)}),
        **{name: made[name] for name in ("machine", "python", "versions")},
        "device": "cpu, 1 thread a run",
        "size": asdict(size),
        "pairs": {seed: of_seed.counts for seed, of_seed in prepared.items()},
        "settings": {run["arm"]: _own(run["config"]) for run in runs},
        "reward_models": [_without_config(judge) for judge in judges],
        "runs": [_without_config(run) for run in runs],
        "learning_rate_sweep": [_without_config(run) for run in json.loads(sweep.read_text())]
        if sweep.exists()
        else [],
        "hh_rlhf": {**_without_config(hh), "settings": _of_hh(hh["config"])},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _own(config: dict[str, Any]) -> dict[str, Any]:
    """What the arms differ in."""
    return {name: config[name] for name in ("mixing", "ppo", "kl", "preferences", "sft", "objectives", "sampling")}


def _of_hh(config: dict[str, Any]) -> dict[str, Any]:
    names = ("data", "preferences", "objectives", "optimizer", "scheduler")
    return {"model": {**config["model"], "name": Path(config["model"]["name"]).name}} | {n: config[n] for n in names}


def _without_config(run: Result) -> Result:
    return {name: value for name, value in run.items() if name not in ("config", "folder", "points")}


if __name__ == "__main__":
    main()
