"""A process that answers prompts with a copy of the policy, while the learner learns."""

import io
import multiprocessing
import queue
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid.core import Encoded, RunStopped
from hybrid.models import Policy
from hybrid.rollout.engine import RolloutConfig
from hybrid.rollout.respond import respond
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.torch_engine import TorchEngine

__all__ = ["Actor", "Answered", "Sampler"]

# Between two looks at whether the process still lives.
LOOK_SECONDS = 1.0


class Answered(NamedTuple):
    """Prompts with responses to them, as `respond` gives them.

    idle: the share of its time, since the answer before, that the actor had nothing to do.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    responses: Responses
    idle: float = 0.0

    def to(self, device: torch.device | str) -> "Answered":
        """The same, on the device."""
        found = self.responses
        logprob = None if found.logprob is None else found.logprob.to(device)
        responses = Responses(found.ids.to(device), found.mask.to(device), found.ended.to(device), logprob)
        return Answered(self.prompt_ids.to(device), self.prompt_mask.to(device), responses, self.idle)


@dataclass(frozen=True)
class Sampler:
    """All that responses are drawn with.   autocast: the dtype that is computed in; None: the weights' own."""

    policy: Policy
    tokenizer: Any
    sampling: SamplingConfig
    rollout: RolloutConfig
    samples_per_prompt: int
    autocast: torch.dtype | None

    def answered(self, engine: TorchEngine, examples: Sequence[Encoded], seed: int) -> Answered:
        """Responses to the prompts, whose every draw comes of the seed."""
        device = self.policy.device
        generator = torch.Generator(device).manual_seed(seed)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            found = respond(
                engine, examples, tokenizer=self.tokenizer, sampling=self.sampling, generator=generator,
                samples_per_prompt=self.samples_per_prompt,
            )  # fmt: skip
        return Answered(*found)


class Actor:
    """Answers what it is asked, in order. Owns the process, which has its own copy of the sampler's policy.

    What is asked and answered waits in queues: neither side waits for the other to take it. It travels as bytes.
    """

    def __init__(self, sampler: Sampler):
        context = multiprocessing.get_context("spawn")
        self._asked, self._found = context.Queue(), context.Queue()
        # As bytes: torch would move the policy's own weights into memory that both processes write.
        self._process = context.Process(
            target=_work, args=(_packed(sampler), torch.get_num_threads(), self._asked, self._found), daemon=True
        )
        self._process.start()

    def ask(self, examples: Sequence[Encoded], seed: int, weights: dict[str, Tensor] | None) -> None:
        """Have the prompts answered.   weights: of the policy, those that have changed; None: none has."""
        self._asked.put(_packed((tuple(examples), seed, weights)))

    def answer(self) -> Answered:
        """The next answer, waited for. Raises RunStopped with its traceback where the process failed."""
        while True:
            try:
                found = _unpacked(self._found.get(timeout=LOOK_SECONDS))
                break
            except queue.Empty:
                if not self._process.is_alive() and self._found.empty():
                    raise RunStopped(
                        f"the actor of rollout.staleness ended with exit code {self._process.exitcode} and no word: a "
                        "negative one is the signal that killed it (9: often for want of memory); what it printed "
                        "stands above. A script that starts a run needs `if __name__ == '__main__':` around it"
                    ) from None
        if isinstance(found, str):
            raise RunStopped(f"the actor of rollout.staleness failed:\n{found}")
        assert isinstance(found, Answered)
        return found

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        for each in (self._asked, self._found):
            each.cancel_join_thread()
            each.close()


def _work(packed: bytes, num_threads: int, asked: Any, found: Any) -> None:
    """The process: answer until there is no one to ask."""
    try:
        torch.set_num_threads(num_threads)
        sampler: Sampler = _unpacked(packed)
        engine = TorchEngine(sampler.policy, sampler.rollout)
        ended = time.perf_counter()
        while True:
            examples, seed, weights = _unpacked(asked.get())
            began = time.perf_counter()
            if weights is not None:
                sampler.policy.load_state_dict(weights, strict=False)
            answered = sampler.answered(engine, examples, seed).to("cpu")
            idle = (began - ended) / (time.perf_counter() - ended)
            ended = time.perf_counter()
            found.put(_packed(answered._replace(idle=idle)))
    except Exception:  # noqa: BLE001 - whatever it is, the learner raises it
        found.put(_packed(traceback.format_exc()))
        found.close()
        found.join_thread()


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> Any:
    # Our own bytes, of a process that we started.
    return torch.load(io.BytesIO(packed), weights_only=False)
