"""Real processes for tests, on this machine, by gloo: started by torchrun, or forked where all is loaded already."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Where the Makefile puts what is not to be in the environment of all other tests.
DEEPSPEED = Path(sys.prefix) / "deepspeed"
# The programs that processes run.
STEPS, FAULTY, LOADED = (str(ROOT / "tests" / "distributed" / f"{name}.py") for name in ("steps", "faulty", "loaded"))
# What each step of the first trains, of how many rows: 5 is no multiple of 2 or 3, and of 1 row others have none;
# "then" is a step of PPO, and one in which the value head has no gradient.
KINDS = ("sft", "one", "ppo", "grpo", "dpo", "kto", "joint", "then")
# When one has failed the others have so many seconds, as under torchrun, before they are killed.
GRACE = 10

# Importing takes a process 5 seconds, and its run 2.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hybrid.cli", "hybrid.trainer", "hybrid.distributed.fsdp2", "hybrid.distributed.ddp",
                              "transformers.models.llama.modeling_llama", "launched"])  # fmt: skip


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


def forked(count: int, program: str, *arguments: str, engine: str = "ddp") -> subprocess.CompletedProcess[str]:
    """So many processes of a program (a file, or "-m MODULE"), with no torchrun above them: they end each other."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        files = [Path(folder, name) for name in ("out", "err")]
        processes = []
        with mock.patch.dict(os.environ, environment()):  # what the first one forks from keeps
            for rank in range(count):
                own = environment(engine) | (place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})
                process = FORKS.Process(target=_run, args=(program, arguments, own, files))
                process.start()
                processes.append(process)
        codes = _ended(processes)
        out, err = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return subprocess.CompletedProcess([program, *arguments], next(filter(None, codes), 0), out, err)


def _run(program: str, arguments: tuple[str, ...], environ: dict[str, str], files: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    sys.path += [path for path in environ["PYTHONPATH"].split(os.pathsep) if path not in sys.path]
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if program == "-m":
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")


def _ended(processes: list[multiprocessing.process.BaseProcess]) -> list[int]:
    """Their exit statuses, in the order of their ends."""
    codes: list[int] = []
    running, deadline = list(processes), time.monotonic() + 300
    while running:
        wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic()))
        late = time.monotonic() >= deadline
        for process in [process for process in running if late or process.exitcode is not None]:
            process.kill()
            process.join()
            running.remove(process)
            codes.append(process.exitcode)
            if codes[-1]:
                deadline = min(deadline, time.monotonic() + GRACE)
    return codes


def sections(engine: str, **others: object) -> dict[str, object]:
    """The config's section of "ddp", "fsdp2", "deepspeed-2" ..."""
    name, _, stage = engine.partition("-")
    return {"distributed": {"engine": name, **({"zero_stage": int(stage)} if stage else {}), **others}}
