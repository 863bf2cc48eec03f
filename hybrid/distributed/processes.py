"""Several processes: what they say to each other beside gradients."""

import datetime
import io
import logging
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hybrid.core import RunStopped
from hybrid.distributed.config import DistributedConfig
from hybrid.distributed.launch import Place
from hybrid.distributed.watch import Watch
from hybrid.distributed.world import LossOf, World

__all__ = ["LossModule", "Processes"]

T = TypeVar("T")
# While one process judges or writes, the others wait for it as long as it takes: `Watch` sees one that stands still.
PATIENCE = datetime.timedelta(days=7)


class LossModule(nn.Module):
    """The policy as engines want a model: one whose forward is all that there is a gradient of, the head included."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.policy = policy

    def forward(self, loss_of: LossOf, rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_of(rows)


class Processes(World):
    """All verbs but the model's. Objects go by gloo, in a group of their own: gradients never mix with them."""

    def __init__(self, place: Place, config: DistributedConfig):
        self.rank, self.size, self.config = place.rank, place.size, config
        self._objects = _joined(place)
        self._watch: Watch | None = None
        self._holds_all = False
        if self.rank:
            _silence()
        _set_streams(self.once(_streams))

    def each(self, work: Callable[[], T]) -> list[T]:
        return self._exchanged(work)

    def once(self, work: Callable[[], T]) -> T:
        def alone() -> tuple[T, bytes | None]:
            before = _streams()
            with self._standing():
                made = work()
            after = _streams()
            return made, None if after == before else after

        # The first one's is all that the others get: they have nothing to say.
        told: Any = self._exchanged(alone if self.rank == 0 else lambda: None)
        result, streams = told[0]
        # What a reward drew of the global streams, which all have in common, the others have not.
        if self.rank and streams is not None:
            _set_streams(streams)
        return cast(T, result)

    def main(self, work: Callable[[], T]) -> T | None:
        made: list[T] = []
        self.once(lambda: made.append(work()))
        return made[0] if made else None

    def _exchanged(self, work: Callable[[], Any]) -> list[Any]:
        """What every process has made, or the first error of any.

        All verbs go through this one exchange: an error is told to the others at whatever verb they come to next.
        """
        outcome: tuple[bool, Any]
        own: Exception | None = None
        try:
            outcome = True, work()
        except Exception as error:  # noqa: BLE001 - raised again below, in every process
            own, outcome = error, (False, _told(error))
        packed = [b""] * self.size
        with self._standing():
            dist.all_gather_object(packed, _packed(outcome), group=self._objects)
        outcomes = [torch.load(io.BytesIO(x), map_location="cpu", weights_only=False) for x in packed]
        for rank, (well, made) in enumerate(outcomes):
            if not well:
                raise own if rank == self.rank and own is not None else _as_told(rank, made)
        return [made for _, made in outcomes]

    @contextmanager
    def watched(self) -> Iterator[None]:
        watch = Watch(self.rank, self.size, self.config.timeout, share=lambda port: self.once(lambda: port))
        self._watch = watch
        try:
            with watch:
                yield
                self.each(lambda: None)  # none leaves while another may still ask for its beat
        finally:
            self._watch = None

    def backward(self, loss: Tensor) -> None:
        # Engines take the mean over processes; a loss is divided by the whole update's count already.
        (loss * self.size).backward()

    @contextmanager
    def _standing(self) -> Iterator[None]:
        """Inside the block this process may stand still: it waits for another, or for what it alone was asked."""
        if self._watch is None:
            yield
            return
        with self._watch.waiting():
            yield

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self._holds_all:  # by a block around this one
            yield
            return
        self._holds_all = True
        try:
            with self._gathering():
                yield
        finally:
            self._holds_all = False

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        """`gathered`, of an engine whose processes do not hold all."""
        yield

    @contextmanager
    def own_randomness(self, device: torch.device) -> Iterator[None]:
        seed = int(torch.randint(2**62, ()))  # of the stream that all have in common
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.rank)
            yield


@cache
def _joined(place: Place) -> dist.ProcessGroup:
    """The group that objects travel in, of the run's processes, which are all there now."""
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if (dist.get_rank(), dist.get_world_size()) != (place.rank, place.size):
        raise RunStopped(
            f"the launcher said process {place.rank} of {place.size}, and torch.distributed has made it "
            f"{dist.get_rank()} of {dist.get_world_size()}"
        )
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _streams() -> bytes:
    """The state of the global streams of random numbers."""
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()))


def _set_streams(state: bytes) -> None:
    python, numpy, on_cpu = pickle.loads(state)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch.from_numpy(on_cpu))


def _silence() -> None:
    """The first process speaks for all."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _packed(outcome: Any) -> bytes:
    """As bytes, in which no tensor is on a device of this process's own."""
    buffer = io.BytesIO()
    torch.save(outcome, buffer)
    return buffer.getvalue()


def _told(error: Exception) -> Any:
    """The error as others can be told of it: itself, or what it says where it does not travel."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - it is anybody's class
        return f"{type(error).__name__}: {error}"
    return error


def _as_told(rank: int, error: Any) -> Exception:
    """Another process's error, to be raised here."""
    if isinstance(error, Exception):
        error.add_note(f"It was raised by process {rank}.")
        return error
    return RunStopped(f"process {rank}: {error}")
