"""Real processes for tests: torchrun, on this machine, by gloo."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Where the Makefile puts what is not to be in the environment of all other tests.
DEEPSPEED = Path(sys.prefix) / "deepspeed"
# The programs that processes run.
STEPS, FAULTY, LOADED = (str(ROOT / "tests" / "distributed" / f"{name}.py") for name in ("steps", "faulty", "loaded"))
# What each step of the first trains, of how many rows: 5 is no multiple of 2 or 3, and of 1 row others have none;
# "then" is a step of PPO, and one in which the value head has no gradient.
KINDS = ("sft", "one", "ppo", "grpo", "dpo", "kto", "joint", "then")


def needs(engine: str) -> None:
    """Skip where DeepSpeed is asked for and not installed."""
    if engine.startswith("deepspeed") and find_spec("deepspeed") is None and not DEEPSPEED.is_dir():
        pytest.skip("DeepSpeed is not installed: make .venv/.installed-dev puts it into .venv/deepspeed")


def environment(engine: str = "ddp") -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    if engine.startswith("deepspeed"):
        paths.append(str(DEEPSPEED))
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def python(*arguments: str, engine: str = "ddp", timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """One process, and those that it starts."""
    return subprocess.run(
        [sys.executable, *arguments], env=environment(engine), capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )


def torchrun(count: int, *arguments: str, engine: str = "ddp") -> subprocess.CompletedProcess[str]:
    """So many processes of a program."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    return python(*launcher, *arguments, engine=engine)


def sections(engine: str, **others: object) -> dict[str, object]:
    """The config's section of "ddp", "fsdp2", "deepspeed-2" ..."""
    name, _, stage = engine.partition("-")
    return {"distributed": {"engine": name, **({"zero_stage": int(stage)} if stage else {}), **others}}
