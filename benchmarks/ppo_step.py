"""One PPO iteration by phase: ours beside TRL's two PPO trainers, by turns in one run.

    python benchmarks/ppo_step.py                             # on the CPU: tiny, mid and SmolLM2's shape
    python benchmarks/ppo_step.py --contenders ours ours:model.precision=bfloat16 --sizes mid
    python benchmarks/ppo_step.py --gpu --sizes gpt2          # one size a command, at most 6 minutes

All contenders get the same model files and prompts, and must report the same numbers of tokens drawn, tokens trained on
and optimizer steps in every round, or the run ends. Prints one table, and writes a file for each size:
benchmarks/results/ppo_step-SIZE-DEVICE.json.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":
    sys.path[0] = str(ROOT)

from benchmarks.contender_process import (  # noqa: E402
    Failed,
    Process,
    add_options,
    by_turns,
    environment,
    parsed_options,
)
from benchmarks.contenders.protocol import PPOJob  # noqa: E402
from benchmarks.kernels import table  # noqa: E402
from benchmarks.ppo_environments import interpreter  # noqa: E402
from benchmarks.ppo_sizes import SIZES, Size, write_model  # noqa: E402
from benchmarks.stamp import stamp  # noqa: E402

SEED = 0
SCRIPTS = {"ours": "ppo_ours.py", "trl-0.11.4": "ppo_trl_011.py", "trl-1.12.0": "ppo_trl_112.py"}
ON_CPU = ["ours", "trl-0.11.4", "trl-1.12.0"]
ON_GPU = ["ours", "ours:model.precision=bfloat16", "ours+generate", "ours+vllm", "trl-1.12.0", "trl-1.12.0:bf16=true"]
LARGE_ON_GPU = ["ours:model.precision=bfloat16", "trl-1.12.0:bf16=true"]
PHASES = ("generate", "score", "update", "all")
COLUMNS = ["size", "contender", *(f"{phase} s" for phase in PHASES), "fastest", "slowest", "x ours", "peak MiB"]


@dataclass(frozen=True)
class Contender:
    """PACKAGE[+ROLLOUT][:KEY=VALUE,...]: what is measured, what draws the responses, and what its config is told."""

    name: str

    @property
    def package(self) -> str:
        return self._parts[0].partition("+")[0]

    @property
    def is_ours(self) -> bool:
        return self.package == "ours"

    @property
    def _parts(self) -> tuple[str, str]:
        head, _, options = self.name.partition(":")
        return head, options

    def check(self) -> None:
        """Raise ValueError where there is no such contender."""
        rollout = self._parts[0].partition("+")[2]
        if self.package not in SCRIPTS or rollout not in (("", "generate", "vllm") if self.is_ours else ("",)):
            known = ", ".join([*SCRIPTS, "ours+generate", "ours+vllm"])
            raise ValueError(f"unknown contender {self.name!r}; known: {known}, each with :KEY=VALUE,... behind it")

    def job(self, job: PPOJob, options: list[str]) -> PPOJob:
        """The job for it. options: those of all of ours, before its own."""
        head, own = self._parts
        given = (*(options if self.is_ours else ()), *filter(None, own.split(",")))
        return replace(job, options=given, rollout=head.partition("+")[2] or "own")


def main() -> None:
    arguments = parsed()
    began = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.sizes:
        names = arguments.contenders or defaults(SIZES[name], arguments.device)
        measured = measure(name, [Contender(one) for one in names], arguments, began)
        rows += measured
        if not arguments.quick:
            write(name, measured, arguments)
    print(table([in_table(row) for row in rows], COLUMNS))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, help="default: tiny mid smollm2; with --gpu: gpt2")
    add("--contenders", nargs="+", metavar="NAME[:KEY=VALUE,...]", help="ours, ours+generate, ours+vllm, trl-0.11.4, "
        "trl-1.12.0, each with settings of its own config; `x ours` is over the first of ours")  # fmt: skip
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings of HybridConfig, for all of ours")
    add_options(parser, rounds=5, of="iterations")
    add("--env-dir", type=Path, default=Path.home() / ".cache" / "hybrid-bench", help="where TRL's environments are")
    add("--trl-python", help="an interpreter that has TRL, instead of those environments; with --gpu: this one")
    arguments = parsed_options(parser)
    arguments.sizes = arguments.sizes or (["gpt2"] if arguments.gpu else ["tiny", "mid", "smollm2"])
    arguments.trl_python = arguments.trl_python or (sys.executable if arguments.gpu else None)
    try:
        for name in arguments.contenders or ():
            Contender(name).check()
    except ValueError as error:
        parser.error(str(error))
    return arguments


def defaults(size: Size, device: str) -> list[str]:
    if device == "cpu":
        return ON_CPU
    return LARGE_ON_GPU if size.is_large else ON_GPU


def measure(
    name: str, contenders: list[Contender], arguments: argparse.Namespace, began: float
) -> list[dict[str, Any]]:
    """A row for each contender that runs; says which do not, and why."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, size, seed=SEED, device=arguments.device)
        job = PPOJob(
            str(model), size.prompts(SEED), size.response_length, size.epochs, size.minibatch_size,
            arguments.device, SEED,
        )  # fmt: skip
        processes = started(contenders, job, arguments, Path(folder))
        rounds = by_turns(processes, arguments.rounds, began + arguments.limit)
        for process in processes:
            process.close()
    rows = [row(name, process, rounds[process.name]) for process in processes if process.name in rounds]
    for one in rows:
        first = next((other for other in rows if other["contender"].startswith("ours")), one)
        one["times_ours"] = one["seconds"]["all"] / first["seconds"]["all"]
    counts = ", ".join(
        f"{count} {what.replace('_', ' ')}" for what, count in job.counts.items() if what != "prompt_ids"
    )
    print(f"{name}: the same prompts and, in every round of each, {counts}")
    return rows


def started(contenders: list[Contender], job: PPOJob, arguments: argparse.Namespace, folder: Path) -> list[Process]:
    """Those that say that they are ready."""
    processes = []
    for number, contender in enumerate(contenders):
        package, its_job = contender.package, contender.job(job, arguments.options)
        python = sys.executable if contender.is_ours else arguments.trl_python
        python = python or interpreter(package, arguments.env_dir)
        try:
            process = Process(
                contender.name, SCRIPTS[package], its_job, python=python,
                environment=environment(arguments.threads), log=folder / f"{number}.log",
            )  # fmt: skip
        except Failed as failed:
            print(f"{contender.name} is left out: {failed}")
            continue
        if not contender.is_ours and package != (found := f"trl-{process.versions['trl']}"):
            process.close()
            print(f"{contender.name} is left out: {python} has {found}")
            continue
        processes.append(process)
    return processes


def row(size: str, process: Process, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of the rounds, and the rounds."""
    seconds = [answer["seconds"] for answer in answers]
    return {
        "size": size,
        "contender": process.name,
        "versions": process.versions,
        "seconds": {phase: median(one[phase] for one in seconds) for phase in PHASES},
        "spread": [min(one["all"] for one in seconds), max(one["all"] for one in seconds)],
        "peak_mib": answers[-1]["peak_mib"],
        "counts": process.job.counts,
        "options": process.job.options,
        "rounds": seconds,
    }


def in_table(row: dict[str, Any]) -> dict[str, Any]:
    fastest, slowest = row["spread"]
    seconds = {f"{phase} s": row["seconds"][phase] for phase in PHASES}
    return {
        **row, **seconds, "fastest": fastest, "slowest": slowest, "x ours": row["times_ours"],
        "peak MiB": round(row["peak_mib"]),
    }  # fmt: skip


def write(size: str, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    about = {
        "benchmark": "ppo_step",
        **stamp("triton", device=arguments.device),
        "threads": arguments.threads,
        "seed": SEED,
    }
    file = arguments.output / f"ppo_step-{size}-{about['device']}.json"
    file.write_text(json.dumps({**about, "settings": vars(SIZES[size]), "rows": rows}, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
