"""What contenders share: the job they are given, the lines they are asked by, clock and counts.

A contender is a script that runs under an interpreter of its own. It reads a job, a line of JSON, says "ready", then
makes one iteration of it for each further line, and answers each with a line of JSON.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "KL_COEF",
    "LEARNING_RATE",
    "Line",
    "PPOJob",
    "PPOMeter",
    "RolloutJob",
    "SharedJob",
    "endless_tokenizer",
    "now",
    "peak_mib",
    "rewards",
]

# The same for all; what they are changes no time.
LEARNING_RATE, KL_COEF = 1e-6, 0.05


@dataclass(frozen=True)
class RolloutJob:
    """To answer all prompts.

    model: the folder with the model's files.   prompts: ids, all of one length.
    engine: what answers.   precision: what it computes in, float32 or bfloat16.
    """

    model: str
    prompts: list[list[int]]
    response_length: int
    device: str
    engine: str
    precision: str
    seed: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """What an iteration must come to."""
        return {"responses": len(self.prompts), "tokens": len(self.prompts) * self.response_length}


@dataclass(frozen=True)
class PPOJob:
    """One PPO iteration.

    model: the folder with the model's files.   prompts: ids, all of one length; every iteration answers all of them.
    options: KEY=VALUE each, over the contender's own config.   rollout: what draws ours: own, generate or vllm.
    """

    model: str
    prompts: list[list[int]]
    response_length: int
    epochs: int
    minibatch_size: int
    device: str
    seed: int = 0
    options: Sequence[str] = ()
    rollout: str = "own"

    @property
    def counts(self) -> dict[str, int]:
        """What an iteration must come to; `prompt_ids` is a checksum."""
        rows, length = len(self.prompts), len(self.prompts[0]) + self.response_length
        return {
            "prompt_ids": sum(id + 1 for ids in self.prompts for id in ids),
            "generated_tokens": rows * self.response_length,
            "trained_tokens": self.epochs * rows * length,
            "updates": self.epochs * -(-rows // self.minibatch_size),
        }

    @property
    def fields(self) -> dict[str, Any]:
        """The options by name; a value that is JSON is what JSON says."""
        return {key: _parsed(value) for key, value in (option.split("=", 1) for option in self.options)}

    @property
    def texts(self) -> list[str]:
        """The prompts as the model's tokenizer writes them."""
        return [" ".join(map(str, ids)) for ids in self.prompts]


@dataclass(frozen=True)
class SharedJob:
    """A supervised step on the prompts with `targets` behind them, and a PPO iteration of the prompts; in one epoch.

    engine: local, ddp, fsdp2, deepspeed-2 or deepspeed-3.   processes: that share the rows.
    """

    model: str
    prompts: list[list[int]]
    targets: list[list[int]]
    response_length: int
    minibatch_size: int
    device: str
    engine: str
    processes: int
    seed: int = 0
    options: Sequence[str] = ()

    @property
    def counts(self) -> dict[str, int]:
        """What an iteration must come to, of all processes together."""
        rows = len(self.prompts)
        return {"sft_tokens": sum(map(len, self.targets)), "responses": rows, "tokens": rows * self.response_length}


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def rewards(responses: Sequence[str]) -> list[float]:
    """The share of even ids in each response; a word is an id."""
    return [sum(int(word) % 2 == 0 for word in text.split()) / len(text.split()) for text in responses]


def endless_tokenizer(folder: str) -> Any:
    """The folder's, with an EOS and a padding that no token has: so responses have full length, whoever draws them."""
    from transformers import PreTrainedTokenizerFast

    size = len(PreTrainedTokenizerFast.from_pretrained(folder))

    class Endless(PreTrainedTokenizerFast):  # type: ignore[misc]
        pad_token, eos_token, pad_token_id, eos_token_id = "none", "none", size, size

    return Endless.from_pretrained(folder)


def now(device: torch.device) -> float:
    """The clock, when all is done that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib(device: torch.device) -> float:
    """Of the process since its start: resident, or allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


class PPOMeter:
    """Seconds by phase, counts and peak memory of one iteration.

    Phase `generate` ends where the contender calls `generated`, `score` (rewards, scoring, advantages) with the first
    forward pass that has a gradient, `update` with the iteration.
    model: the policy.   trained_tokens are those that it embeds with a gradient, prompt_ids those that begin the first
        rows that it embeds without.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, job: PPOJob):
        self.device = torch.device(job.device)
        self._prompts_shape = len(job.prompts), len(job.prompts[0])
        model.get_input_embeddings().register_forward_pre_hook(self._embed)
        optimizer.register_step_post_hook(self._step)
        self.begin()

    def begin(self) -> None:
        self._counts = {"prompt_ids": 0, "generated_tokens": 0, "trained_tokens": 0, "updates": 0}
        self._num_prompts = 0
        self._marks = {"begin": now(self.device)}

    def generated(self, num_tokens: int) -> None:
        self._marks["generate"] = now(self.device)
        self._counts["generated_tokens"] += num_tokens

    def end(self) -> dict[str, Any]:
        self._marks["update"] = now(self.device)
        names = list(self._marks)
        parts = {b: self._marks[b] - self._marks[a] for a, b in pairwise(names)}
        return {
            "seconds": {**parts, "all": sum(parts.values())},
            "peak_mib": peak_mib(self.device),
            "counts": self._counts,
        }

    def _embed(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            if "score" not in self._marks:
                self._marks["score"] = now(self.device)
            self._counts["trained_tokens"] += inputs[0].numel()
        elif self._num_prompts < self._prompts_shape[0]:
            self._num_prompts += len(inputs[0])
            self._counts["prompt_ids"] += int((inputs[0][:, : self._prompts_shape[1]] + 1).sum())

    def _step(self, *_: Any) -> None:
        self._counts["updates"] += 1


class Meter(Protocol):
    def begin(self) -> None: ...

    def end(self) -> dict[str, Any]:
        """`seconds`, `peak_mib` and `counts` since `begin`."""
        ...


Job = TypeVar("Job", PPOJob, RolloutJob, SharedJob)


class Line(Generic[Job]):
    """The contender's end of the line to `contender_process.py`. Owns stdout: what else is printed goes to stderr."""

    def __init__(self, kind: type[Job], *packages: str):
        self._pipe = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._packages = packages
        self.job = kind(**json.loads(sys.stdin.readline()))
        torch.manual_seed(self.job.seed)

    def iterations(self, meter: Meter) -> Iterator[None]:
        """Yields for each request; what is done until the next one is taken is the iteration."""
        self._write({"ready": {package: _version(package) for package in ("torch", "transformers", *self._packages)}})
        for _ in sys.stdin:
            meter.begin()
            yield
            self._write(meter.end())

    def _write(self, answer: dict[str, Any]) -> None:
        self._pipe.write(json.dumps(answer) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
