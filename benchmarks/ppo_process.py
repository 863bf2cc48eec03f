"""A contender of `ppo_step.py` in a process of its own, asked for one iteration at a time."""

import json
import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.ppo_contenders.protocol import Job

__all__ = ["Contender", "Failed", "Process"]

HERE = Path(__file__).resolve().parent / "ppo_contenders"
SCRIPTS = {"ours": "ours.py", "trl-0.11.4": "trl_011.py", "trl-1.12.0": "trl_112.py"}


class Failed(Exception):
    """A contender that ended; the message is the last that it said."""


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

    def job(self, job: Job, options: list[str]) -> Job:
        """The job for it. options: those of all of ours, before its own."""
        head, own = self._parts
        given = (*(options if self.is_ours else ()), *filter(None, own.split(",")))
        return replace(job, options=given, rollout=head.partition("+")[2] or "own")


class Process:
    """The running contender. Owns the process, and the file that takes what it says beside its answers."""

    def __init__(self, contender: Contender, python: str, job: Job, environment: dict[str, str], log: Path):
        self.contender, self.job, self._log = contender, job, log
        with log.open("w") as said:
            self._process = subprocess.Popen(
                [python, str(HERE / SCRIPTS[contender.package]), job.to_json()],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, bufsize=1, env=environment,
            )  # fmt: skip
        self.versions: dict[str, str] = self._answer()["ready"]
        trl = f"trl-{self.versions['trl']}" if "trl" in self.versions else contender.package
        if trl != contender.package:
            self.close()
            raise Failed(f"{python} has {trl}")

    def iteration(self) -> dict[str, Any]:
        """Have one made; its `seconds`, `peak_mib` and `counts`."""
        assert self._process.stdin is not None
        # Of one that has ended the last words are read below.
        with suppress(BrokenPipeError):
            self._process.stdin.write("\n")
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            said = self._log.read_text().strip().splitlines()
            raise Failed(said[-1] if said else f"ended with status {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        return answer
