"""An SFT step and a PPO iteration on one process and on two, of each engine, by turns in one run.

    python benchmarks/distributed.py                   # on the CPU, a thread for each process; about 15 minutes
    python benchmarks/distributed.py --engines local ddp
    python benchmarks/distributed.py --gpu             # a process for each GPU, at most 6 minutes

All make the same global batch: the efficiency is strong scaling, t1 / (n tn). Prints one table and writes
benchmarks/results/distributed-DEVICE.json. DeepSpeed must be importable (`PYTHONPATH=.venv/deepspeed`), or is left out.
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
from benchmarks.contenders.protocol import SharedJob  # noqa: E402
from benchmarks.kernels import table  # noqa: E402
from benchmarks.ppo_sizes import SIZES, Size, llama, write_model  # noqa: E402
from benchmarks.stamp import stamp  # noqa: E402

SEED = 0
STEPS = ("sft", "ppo")
ENGINES = ("local", "ddp", "fsdp2", "deepspeed-2", "deepspeed-3")
QUICK = Size("llama", llama(2, 64, 128, 2, 2), 512, 4, 8, 4, epochs=1, minibatch_size=4)
# Of its 13.6 million weights 39 % are embedding and head.
ON_CPU = Size("llama", llama(6, 320, 1024, 5, 5), 8192, 16, 32, 32, epochs=1, minibatch_size=8)
ON_GPU = replace(SIZES["llama-1.5b"], num_prompts=64)
COLUMNS = ["engine", "processes", *(f"{step} {what}" for step in STEPS for what in
           ("s", "efficiency", "by cpu", "talking")), "peak MiB", "weights", "gradients", "states"]  # fmt: skip


@dataclass(frozen=True)
class Contender:
    engine: str
    processes: int

    @property
    def name(self) -> str:
        return f"{self.engine} x{self.processes}"


def main() -> None:
    arguments = parsed()
    began = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    size = QUICK if arguments.quick else ON_GPU if arguments.gpu else ON_CPU
    rows = measure(size, arguments, began)
    if not arguments.quick:
        write(size, rows, arguments)
    print(table([in_table(row) for row in rows], COLUMNS))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="local: of one process; default: all")
    add("--nproc", type=int, help="processes that share the rows; default: 2, with --gpu: one for each GPU")
    add("--options", nargs="+", metavar="KEY=VALUE", help="settings of HybridConfig; with --gpu: "
        "model.precision=bfloat16")  # fmt: skip
    add_options(parser, rounds=5, of="iterations")
    parser.set_defaults(threads=1)
    arguments = parsed_options(parser)
    arguments.nproc = arguments.nproc or (torch.cuda.device_count() if arguments.gpu else 2)
    arguments.options = arguments.options or (["model.precision=bfloat16"] if arguments.gpu else [])
    return arguments


def measure(size: Size, arguments: argparse.Namespace, began: float) -> list[dict[str, Any]]:
    """A row for each engine that runs; says which do not, and why.

    On a GPU one after the other, for it does not hold several; on a CPU by turns.
    """
    contenders = [Contender(engine, 1 if engine == "local" else arguments.nproc) for engine in arguments.engines]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", size, seed=SEED, device=arguments.device)
        groups = [[one] for one in contenders] if arguments.gpu else [contenders]
        answers: dict[str, Any] = {}
        for number, group in enumerate(groups, 1):
            processes = started(group, size, Path(folder), arguments)
            deadline = began + arguments.limit * number / len(groups)
            answers |= by_turns(processes, arguments.rounds, deadline)
            for process in processes:
                process.close()
    rows = [row(one, answers[one.name]) for one in contenders if one.name in answers]
    for one in rows if rows and rows[0]["engine"] == "local" else []:
        for step in STEPS:
            alone, here = rows[0][step], one[step]
            one[step]["efficiency"] = alone["seconds"] / (one["processes"] * here["seconds"])
            one[step]["efficiency_by_cpu"] = alone["cpu_seconds"] / (one["processes"] * here["cpu_seconds"])
    return rows


def started(contenders: list[Contender], size: Size, folder: Path, arguments: argparse.Namespace) -> list[Process]:
    """Those that say that they are ready."""
    prompts = size.prompts(SEED)
    targets = [ids[: size.response_length] for ids in size.prompts(SEED + 1)]
    processes = []
    for one in contenders:
        job = SharedJob(
            str(folder / "model"), prompts, targets, size.response_length, size.minibatch_size,
            arguments.device, one.engine, one.processes, SEED, tuple(arguments.options),
        )  # fmt: skip
        try:
            process = Process(
                one.name, "shared_ours.py", job, python=sys.executable,
                environment=environment(arguments.threads), log=folder / f"{one.name}.log",
            )  # fmt: skip
        except Failed as failed:
            print(f"{one.name} is left out: {failed}")
            continue
        processes.append(process)
    return processes


def row(contender: Contender, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of the rounds, of the process that has most; of the time in collectives, of the one that has least.

    What another process spends there beyond that it waits for this one, and says nothing.
    """
    rounds = [answer["processes"] for answer in answers]
    last = rounds[-1]
    result: dict[str, Any] = {
        "engine": contender.engine,
        "processes": contender.processes,
        "peak_mib": median(max(one["peak_mib"] for one in told) for told in rounds),
        "bytes": {what: max(one["bytes"][what] for one in last) for what in ("weights", "gradients", "states")},
    }
    for step in STEPS:
        walls = [max(one["clocks"][step]["wall"] for one in told) for told in rounds]
        cpus = [max(one["clocks"][step]["cpu"] for one in told) for told in rounds]
        shares = [min(one["talks"][step]["seconds"] / one["talks"][step]["wall"] for one in told) for told in rounds]
        result[step] = {
            "seconds": median(walls), "spread": [min(walls), max(walls)], "cpu_seconds": median(cpus),
            "talking": median(shares), "talking_spread": [min(shares), max(shares)],
            "sent": last[0]["talks"][step]["bytes"],
        }  # fmt: skip
    return result


def in_table(row: dict[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {"engine": row["engine"], "processes": row["processes"], "peak MiB": round(row["peak_mib"])}
    for step in STEPS:
        of = row[step]
        cells[f"{step} s"], cells[f"{step} talking"] = of["seconds"], f"{of['talking']:.0%}"
        if "efficiency" in of:
            cells[f"{step} efficiency"] = f"{of['efficiency']:.2f}"
            cells[f"{step} by cpu"] = f"{of['efficiency_by_cpu']:.2f}"
    return cells | {what: f"{count / 2**20:.1f}" for what, count in row["bytes"].items()}


def write(size: Size, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    about = {
        "benchmark": "distributed",
        **stamp("deepspeed", device=arguments.device),
        "threads": arguments.threads,
        "seed": SEED,
        "options": arguments.options,
        "settings": vars(size),
    }
    file = arguments.output / f"distributed-{about['device']}.json"
    file.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
