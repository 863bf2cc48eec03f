"""A supervised step and a PPO iteration of HybridTrainer in several processes; see protocol.py.

This process is the first of them, and starts the others. Each iteration is made twice: timed, and again under torch's
profiler, whose events of gloo or NCCL say what the processes had to tell each other.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from protocol import KL_COEF, LEARNING_RATE, Line, SharedJob, endless_tokenizer, now, rewards
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hybrid import HybridConfig, HybridTrainer
from hybrid.core import IGNORE, Batch

Step = Callable[[], Any]
BYTES = {"float": 4, "c10::BFloat16": 2, "double": 8, "long int": 8, "int": 4, "unsigned char": 1, "bool": 1}


def main() -> None:
    if len(sys.argv) > 1:
        shared = Shared(SharedJob(**json.loads(sys.argv[1])))
        while shared.world.once(lambda: None):
            shared.iteration()
        return
    line = Line(SharedJob, "deepspeed")
    others = started(line.job)
    shared = Shared(line.job)
    for _ in line.iterations(shared):
        shared.world.once(lambda: True)
        shared.iteration()
    shared.world.once(lambda: False)
    for other in others:
        other.wait()


def started(job: SharedJob) -> list["subprocess.Popen[bytes]"]:
    """The other processes, with torchrun's variables, which this one gets as well."""
    if job.processes == 1:
        return []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=str(job.processes), RANK="0", LOCAL_RANK="0"
    )
    command = [sys.executable, __file__, json.dumps(asdict(job))]
    return [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(1, job.processes)
    ]


class Shared:
    """One of the processes: its trainer, and what its iterations took."""

    def __init__(self, job: SharedJob):
        if job.engine.startswith("deepspeed"):
            import deepspeed  # noqa: F401 - to be among the libraries
        self.device = torch.device(job.device)
        self.libraries = resident("VmRSS") if self.device.type == "cpu" else 0.0
        self.trainer = HybridTrainer(
            tokenizer=endless_tokenizer(job.model), reward=rewards, config=config(job), policy_or_name=job.model
        )
        self.world = self.trainer.world
        prompts = [" ".join(map(str, ids)) for ids in job.prompts]
        self.steps: dict[str, Step] = {
            "sft": lambda: self.trainer.sft_step(batch(job))["num_tokens"],
            "ppo": lambda: self.ppo(prompts),
        }
        self.counts: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.answer: dict[str, Any] = {}
        self.peak: float | None = None
        self.trainer.optimizer.register_step_pre_hook(self.before_step)

    def before_step(self, *_: Any) -> None:
        # ZeRO steps, and lets go of, one group after the other: the first time all are there.
        self.bytes.setdefault("gradients", self.gradients())

    def ppo(self, prompts: list[str]) -> None:
        rollout = self.trainer.rollout(prompts)
        self.counts |= {"responses": len(rollout), "tokens": rollout.num_tokens}
        self.trainer.ppo_step(rollout)

    def begin(self) -> None:
        """Nothing: an iteration begins where all processes have heard of it."""

    def end(self) -> dict[str, Any]:
        return self.answer

    def iteration(self) -> None:
        peak_again(self.device)
        clocks = {name: self.timed(step) for name, step in self.steps.items()}
        if self.peak is None:  # in all later ones is what the profiler has taken
            self.peak = peak_mib(self.device) - self.libraries
        talks = {name: self.profiled(step) for name, step in self.steps.items()}
        self.bytes |= {"weights": self.weights(), "states": self.states()}
        told = self.world.each(lambda: {"clocks": clocks, "talks": talks, "peak_mib": self.peak, "bytes": self.bytes})
        self.answer = {"counts": self.counts, "processes": told}

    def timed(self, step: Step) -> dict[str, float]:
        self.world.each(lambda: None)  # together
        began, cpu = now(self.device), time.process_time()
        found = step()
        seconds = {"wall": now(self.device) - began, "cpu": time.process_time() - cpu}
        if found is not None:
            self.counts["sft_tokens"] = int(found)
        return seconds

    def profiled(self, step: Step) -> dict[str, Any]:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        self.world.each(lambda: None)
        with profile(activities=kinds, record_shapes=True) as found:
            began = now(self.device)
            step()
            seconds = now(self.device) - began
        return {"wall": seconds, **communication(found.profiler.kineto_results.events(), self.world.size)}

    # What of the model is here, in bytes

    def weights(self) -> int:
        """The model's, and those that ZeRO steps in their place."""
        return storage([*(getattr(x, "ds_tensor", x) for x in self.trainer.policy.parameters()), *self.stepped()])

    def gradients(self) -> int:
        zero = getattr(self.world, "_zero", None)
        kept: list[Any] = [getattr(zero, "grad_partitions_flat_buffer", None)]  # stage 3's
        if kept[0] is None:
            kept = [None, *(x.grad for x in (*self.trainer.policy.parameters(), *self.stepped()))]
        # Stage 2's of the groups that are not stepped yet; they lie in a bucket.
        waiting = {} if isinstance(kept[0], Tensor) else getattr(zero, "averaged_gradients", {})
        return storage(kept) + sum(x.nbytes for of in waiting.values() for x in of or ())

    def stepped(self) -> list[Any]:
        """ZeRO's flat parts, which are no parameters of the model."""
        zero = getattr(self.world, "_zero", None)
        found = getattr(zero, "fp32_partitioned_groups_flat", getattr(zero, "single_partition_of_fp32_groups", []))
        return list(found)

    def states(self) -> int:
        return storage(x for of in self.trainer.optimizer.state.values() for x in of.values())


def batch(job: SharedJob) -> Batch:
    """The supervised one, of which the targets are trained; without the EOS, which the model has not."""
    prompts, targets = torch.tensor(job.prompts), torch.tensor(job.targets)
    ids = torch.cat([prompts, targets], dim=1)
    labels = torch.cat([torch.full_like(prompts, IGNORE), targets], dim=1)
    return Batch(ids, torch.ones_like(ids), labels)


def storage(tensors: Iterable[Any]) -> int:
    """Bytes that tensors take here, each once, parts of others with them."""
    found = {}
    for x in tensors:
        if isinstance(x, Tensor):
            here = (x.to_local() if hasattr(x, "to_local") else x).untyped_storage()
            found[here.data_ptr()] = here.nbytes()
    return sum(found.values())


def communication(events: Iterable[Any], size: int) -> dict[str, Any]:
    """Seconds in which a collective of numbers was under way, and their bytes, whole, by kind.

    An all-gather's whole is what each process has behind it. Objects, which travel as bytes, are counted apart.
    """
    spans: list[tuple[int, int]] = []
    wholes: dict[str, int] = {}
    for event in events:
        library, _, kind = event.name().partition(":")
        if library not in ("gloo", "nccl"):
            continue
        spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
        tensors = [(dtype, math.prod(shape)) for dtype, shape in zip(event.dtypes(), event.shapes(), strict=True)]
        name = "objects" if any(dtype == "unsigned char" for dtype, _ in tensors) else kind
        amount = sum(BYTES[dtype] * count for dtype, count in tensors if dtype)
        wholes[name] = wholes.get(name, 0) + amount * (size if "gather" in kind else 1)
    return {"seconds": covered(spans) / 1e9, "bytes": wholes}


def covered(spans: list[tuple[int, int]]) -> int:
    """The length of the union."""
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def resident(which: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


def peak_again(device: torch.device) -> None:
    """Let the peak be from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident("VmHWM")


def config(job: SharedJob) -> HybridConfig:
    name, _, stage = job.engine.partition("-")
    sections = {
        "model": {"name": job.model, "device": job.device},
        "data": {"template": "none"},
        "sampling": {"max_new_tokens": job.response_length},
        "kl": {"coef": KL_COEF},
        "sft": {"batch_size": len(job.prompts)},
        "ppo": {"batch_size": len(job.prompts), "epochs": 1, "minibatch_size": job.minibatch_size},
        "optimizer": {"name": "adamw", "lr": LEARNING_RATE},
        "run": {"seed": job.seed},
    }
    if name != "local":
        sections["distributed"] = {"engine": name, **({"zero_stage": int(stage)} if stage else {})}
    return HybridConfig.from_dict(sections, job.options)


if __name__ == "__main__":
    main()
