"""What one of several processes does alone asks nothing of the others: nobody would answer."""

import errno
import random
import signal
import sys
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.amp import GradScaler
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.elastic.multiprocessing.api import SignalException

from hybrid import HybridConfig, HybridTrainer, Policy
from hybrid.core import Encoded, RunStopped
from hybrid.data import collate
from hybrid.distributed import ALONE, DistributedConfig, World, connect, run_processes
from hybrid.distributed.fsdp2 import FSDP2
from hybrid.distributed.processes import Processes
from hybrid.objectives.accumulate import Term, accumulate

ROWS = [{"prompt": f"the w{i} w{i + 1}", "target": f"was good w{i}"} for i in range(12)]
PPO = {"batch_size": 4, "minibatch_size": 4}


class First(World):
    """The first of two processes, whose part is all rows."""

    size = 2
    alone = False

    def share(self, count):
        return slice(0, count)

    def each(self, work):
        assert not self.alone, "all processes are asked in what one of them does alone"
        return [work()]

    def once(self, work):
        assert not self.alone, "all processes are asked in what one of them does alone"
        self.alone = True
        try:
            return work()
        finally:
            self.alone = False

    def main(self, work):
        return self.once(work)

    @contextmanager
    def gathered(self):
        yield


@pytest.fixture
def first(monkeypatch):
    world = First()
    monkeypatch.setattr("hybrid.learner.connect", lambda config: world)
    return world


def reward(responses):
    return [float("good" in text) for text in responses]


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_an_opponent_answers_in_the_process_whose_reward_asks(first, tokenizer, lora, request):
    if lora:
        request.getfixturevalue("needs_peft")
    made = HybridTrainer(
        Policy(tiny_model()), tokenizer, ROWS, {"type": "self_play", "reward": reward, "refresh": 1},
        HybridConfig.from_dict({"sampling": {"max_new_tokens": 4}, "ppo": PPO, "model": {"lora": lora}}),
    )  # fmt: skip
    for _ in range(2):  # against the policy as it is, then against a snapshot
        assert len(made.rollout(ROWS[:4])) <= 4


class Told(Processes):
    """One of two; what the first says, the second hears of it."""

    said: ClassVar[list] = []

    def __init__(self, rank):
        self.rank, self.size, self._watch = rank, 2, None

    def _exchanged(self, work):
        if self.rank == 0:
            self.said[:] = [work()]
        return self.said


def test_global_random_numbers_that_one_process_took_alone_are_taken_in_all():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = Told(0).once(lambda: (random.random(), np.random.rand(), float(torch.rand(()))))
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    # As the other process has them.
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert Told(1).once(lambda: None) == drawn
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


def model():
    return nn.Linear(2, 1)


class Counting(First):
    """Without a loss whose last backward pass fits."""

    def drop(self, optimizer):
        pass

    @contextmanager
    def own_randomness(self, device):
        yield

    def backward(self, loss):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_process_that_others_wait_for_does_not_start_anew():
    """In the last backward pass gradients meet: one that tried again would meet them with another attempt's."""
    batch = collate([Encoded((1, 2), (-100, 2), (1,), "a", "b", {})], pad_id=0)
    weight = nn.Parameter(torch.ones(()))
    term = Term("sft", batch, lambda rows: (weight * 1.0, {}), section="sft")
    with pytest.raises(RunStopped, match=r"out of memory with 1 sft rows .*set sft.microbatch_size lower"):
        accumulate(torch.optim.SGD([weight]), [term], GradScaler(enabled=False), {}, Counting())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_ends_the_launcher_is_its_status(monkeypatch, number):
    def stopped(*arguments):
        raise SignalException("stopped", number)

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *config: stopped)
    assert run_processes(2, ["train", "run.yaml"]) == 128 + number


def test_one_process_of_a_config_that_names_an_engine_needs_nothing_of_it(monkeypatch):
    monkeypatch.setattr(sys.modules[connect.__module__], "find_spec", lambda name: None)
    monkeypatch.delenv("RANK", raising=False)
    assert connect(DistributedConfig(engine="deepspeed")) is ALONE


class Saving(FSDP2):
    """The only one of its run."""

    def __init__(self):
        self.rank, self.size, self._watch = 0, 1, None

    def once(self, work):
        return work()


def test_shards_that_find_no_room_say_so_as_other_files_do(monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise CheckpointException("write", {1: (OSError(errno.ENOSPC, "No space left on device"), None)})

    monkeypatch.setattr("torch.distributed.checkpoint.save", full)
    with pytest.raises(OSError, match="No space left on device"):
        Saving().write_shards({"state": {}}, tmp_path)
    assert not list(tmp_path.iterdir()), "what is half written goes"
