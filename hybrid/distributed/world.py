"""One process, and the verbs that all engines have."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["ALONE", "World"]

T = TypeVar("T")
LossOf = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


class World:
    """The processes of a run, of which this one is `rank`. Here there is one; other engines override the verbs.

    All processes hold the same rows, streams of random numbers and decisions, and go through the same lines; what is
    large is shared out by rows (`share`), and its results are the same everywhere again (`each`, `once`):

        rows = batch[world.share(len(batch))]               # this process's part
        parts = world.each(lambda: work_on(rows))           # of every process, in order; an error is everyone's
        scores = world.once(lambda: reward.score(texts))    # by the first process alone, given to all

    The model is given to it once, before its optimizer is made (`wrap`), and then goes through `loss`, `backward`,
    `grad_norm` and `step`. Where weights are sharded, everything else sees them whole inside `gathered`.
    """

    engine = "local"
    rank = 0
    size = 1
    whole = True  # whether each process holds all weights all the time
    retries = True  # whether an update that ran out of memory can be tried again
    scales = True  # whether it knows of a loss's scale, which float16 has

    def __str__(self) -> str:
        return "1 process" if self.size == 1 else f"{self.size} processes by {self.engine}"

    @property
    def writes(self) -> bool:
        """Whether this is the process that keeps the run's log, and prints."""
        return self.rank == 0

    # Who does what

    def share(self, count: int) -> slice:
        """This process's part of so many rows: parts are as even as can be, and the first ones the larger."""
        size, more = divmod(count, self.size)
        start = self.rank * size + min(self.rank, more)
        return slice(start, start + size + (self.rank < more))

    def largest(self, count: int) -> int:
        """The rows of the largest share."""
        return -(-count // self.size)

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns in every process, in the order of their ranks. What one raises, all raise."""
        return [work()]

    def once(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, which alone runs it. What it raises, all raise."""
        return work()

    def main(self, work: Callable[[], T]) -> T | None:
        """What `work` returns in the first process, None in the others, which wait for it: to write, and to print."""
        return work()

    def first(self, value: T | None) -> T | None:
        """Of all processes the first value that is not None."""
        return next((x for x in self.each(lambda: value) if x is not None), None)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block the end of any process, also one that stands still, is the end of all, with its error."""
        yield

    @contextmanager
    def own_randomness(self, device: torch.device) -> Iterator[None]:
        """Inside the block torch's global streams are this process's own (dropout); behind it the same everywhere."""
        yield

    # The model

    def wrap(self, policy: nn.Module) -> None:
        """Take the model that is trained, before its optimizer is made."""

    def adopt(self, optimizer: torch.optim.Optimizer, *, max_norm: float) -> None:
        """Take the optimizer of the model."""

    def loss(self, loss_of: LossOf, rows: Any, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss_of(rows)`, through which a gradient may go. last: the update's last one, which ends it everywhere."""
        return loss_of(rows)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's loss; behind the last one it is that of all processes' sum."""
        loss.backward()

    def grad_norm(self, module: nn.Module) -> Tensor:
        """(), the norm of the whole gradient."""
        return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])

    def step(self, module: nn.Module, optimizer: torch.optim.Optimizer, norm: Tensor, max_norm: float) -> None:
        """Step the optimizer with the gradient, which has this norm, scaled down to `max_norm` where it is longer."""
        if norm > max_norm:
            nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, norm)
        optimizer.step()

    def drop(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradient."""
        optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside the block every process holds the whole weights: to sample, to score, to save. None is trained."""
        yield

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Inside the block every process may write the same whole weights, which it goes on with behind it."""
        yield

    # Checkpoints

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's state, as torch has it; of sharded weights this process's part."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Take up a state that is whole, or this process's part, of any engine and any number of processes."""
        optimizer.load_state_dict(state)

    def write_shards(self, state: dict[str, Any], beside: Path | None) -> tuple[dict[str, Any], Path | None]:
        """Write what of an optimizer's state each process has a part of; returns the rest, and the folder.

        beside: the folder in which that one is made, hidden; None: the system's for what is temporary. None is made
        where all of the state is whole.
        """
        return state, None

    def read_shards(self, state: dict[str, Any], folder: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state with what `write_shards` wrote, on however many processes, put back in."""
        from hybrid.distributed.shards import read_shards, with_tensors  # here: it loads torch.distributed

        return with_tensors(state, read_shards(folder))


ALONE = World()
