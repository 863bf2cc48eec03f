"""Contenders in processes of their own, asked for one iteration at a time, by turns; and what such a run is told."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders.protocol import PPOJob, RolloutJob, SharedJob

__all__ = ["Failed", "Process", "add_options", "by_turns", "environment", "parsed_options"]

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "benchmarks" / "contenders"


class Failed(Exception):
    """A contender that ended; the message is the last that it said."""


class Process:
    """A running contender. Owns the process, and the file that takes what it says beside its answers."""

    def __init__(
        self,
        name: str,
        script: str,
        job: PPOJob | RolloutJob | SharedJob,
        *,
        python: str,
        environment: dict[str, str],
        log: Path,
    ):
        self.name, self.job, self._log = name, job, log
        with log.open("w") as said:
            self._process = subprocess.Popen(
                [python, str(SCRIPTS / script)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, bufsize=1, env=environment,
            )  # fmt: skip
        self.versions: dict[str, str] = self._asked(json.dumps(asdict(job)))["ready"]

    def iteration(self) -> dict[str, Any]:
        """Have one made; its `seconds`, `peak_mib` and `counts`."""
        return self._asked("")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _asked(self, question: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        # Of one that has ended the last words are read below.
        with suppress(BrokenPipeError):
            self._process.stdin.write(question + "\n")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            said = self._log.read_text().strip().splitlines()
            raise Failed(said[-1] if said else f"ended with status {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def environment(threads: int) -> dict[str, str]:
    """The variables of a contender: so many threads, nothing from a hub, and our packages from this checkout."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def by_turns(processes: Sequence[Process], num_rounds: int, deadline: float) -> dict[str, list[dict[str, Any]]]:
    """The answers of each contender, by its name, without the first round, which warms up.

    deadline: no round but the first two begins that may end later, by `time.perf_counter`.
    Ends the run (SystemExit) where one did not do the work that it was to do.
    """
    answers: dict[str, list[dict[str, Any]]] = {process.name: [] for process in processes}
    longest = 0.0
    for number in range(num_rounds + 1):
        began = time.perf_counter()
        if number > 1 and began + longest > deadline:
            print(f"stopped after {number - 1} rounds, for the time")
            break
        for process in processes:
            name = process.name
            if name not in answers:
                continue
            try:
                answer = process.iteration()
            except Failed as failed:
                print(f"{name} is left out: {failed}")
                del answers[name]
                continue
            if answer["counts"] != process.job.counts:
                sys.exit(f"{name} did other work: {answer['counts']}, where {process.job.counts} was meant")
            if number:
                answers[name].append(answer)
        longest = max(longest, time.perf_counter() - began)
    return answers


def add_options(parser: argparse.ArgumentParser, *, rounds: int, of: str) -> None:
    """The options of every measurement by turns.   rounds: by default.   of: what is measured in one."""
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help=f"{of} of each that are measured, after one that is not")
    add("--threads", type=int, default=2, help="of each contender")
    add("--gpu", action="store_true", help="on the GPU, with sizes for one")
    add("--limit", type=float, help="begin no round that may end later than so many seconds; with --gpu: 330")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="the results' folder")
    add("--quick", action="store_true", help="one round, writes nothing")


def parsed_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says, with `device` and the limits that follow from it."""
    arguments = parser.parse_args()
    arguments.device = "cuda" if arguments.gpu else "cpu"
    arguments.limit = arguments.limit or (330.0 if arguments.gpu else float("inf"))
    arguments.rounds = 1 if arguments.quick else arguments.rounds
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: this machine has no CUDA device")
    return arguments
