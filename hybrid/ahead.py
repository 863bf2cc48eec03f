"""Rollouts that are drawn while the learner learns: `rollout.staleness`."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from hybrid.core import Encoded
from hybrid.functional import autocast_dtype
from hybrid.learner import Learner
from hybrid.rollout import Actor, Answered, Responses, Sampler

__all__ = ["Ahead"]


class Ahead:
    """The answers to a run's prompts, in the order in which they are learnt from. Owns the actor that draws them.

        rollout n is drawn from the weights that stood when rollout max(0, n - k) began to be learnt from

    k = `rollout.staleness`. So what is drawn depends on no clock. With k = 0 there is no actor, and the learner draws
    when it needs to. Its prompts are chosen, and its seed is taken from the run's stream, when a rollout is asked for.

    held: answers that a checkpoint has kept, to be learnt from first.
    """

    def __init__(self, learner: Learner, held: Sequence[Mapping[str, Any]] = ()):
        self.learner, self.staleness = learner, learner.config.rollout.staleness
        self._held = deque(
            (tuple(map(_example, row["examples"])), _answered(row["answered"]), row["behind"]) for row in held
        )
        self._asked: deque[tuple[tuple[Encoded, ...], int]] = deque()  # of the actor, not yet answered
        self._actor: Actor | None = None
        self.metrics: dict[str, float] = {}  # of the last rollout
        self._last: float | None = None  # when that was asked for

    def next(self, choose: Callable[[], Sequence[Encoded]]) -> tuple[Sequence[Encoded], Answered | None]:
        """The examples of the next rollout and the responses to their prompts; None: they are to be drawn now.

        choose: the examples of the rollout that is asked for next.
        """
        if not self.staleness:
            return choose(), None
        began = time.perf_counter()
        weights = None if self._actor is None else self._weights()
        while len(self._held) + len(self._asked) <= self.staleness:
            behind = len(self._held) + len(self._asked)
            self._ask(tuple(choose()), behind, weights)
            weights = None
        examples, answered, behind = self._held.popleft() if self._held else self._answer()
        now = time.perf_counter()
        self.metrics = {"staleness": float(behind), "actor_idle": answered.idle}
        if self._last is not None:
            self.metrics["learner_idle"] = (now - began) / (now - self._last)
        self._last = now
        return examples, answered.to(self.learner.policy.device)

    def state(self) -> list[dict[str, Any]]:
        """What was asked for and is not learnt from yet, answered: a checkpoint waits for the actor."""
        self._held += [self._answer() for _ in range(len(self._asked))]
        return [
            {"examples": [asdict(example) for example in examples], "answered": _state(answered), "behind": behind}
            for examples, answered, behind in self._held
        ]

    def close(self) -> None:
        """End the actor; what it was asked is lost."""
        if self._actor is not None:
            self._actor.close()
            self._actor = None

    def _ask(self, examples: tuple[Encoded, ...], behind: int, weights: dict[str, Tensor] | None) -> None:
        learner = self.learner
        if self._actor is None:
            self._actor = Actor(self._sampler())
        seed = int(torch.randint(2**62, (), generator=learner.sampler, device=learner.sampler.device))
        self._actor.ask(examples, seed, weights)
        self._asked.append((examples, behind))

    def _answer(self) -> tuple[tuple[Encoded, ...], Answered, int]:
        assert self._actor is not None
        examples, behind = self._asked.popleft()
        return examples, self._actor.answer(), behind

    def _sampler(self) -> Sampler:
        learner, config = self.learner, self.learner.config
        learner.policy.backbone.fit_vocabulary(learner.tokenizer)
        with learner.autocast():
            dtype = autocast_dtype(learner.policy.device)
        return Sampler(
            learner.policy, learner.tokenizer, config.sampling, config.rollout, config.ppo.samples_per_prompt, dtype
        )

    def _weights(self) -> dict[str, Tensor]:
        """Those that are trained, as they are now."""
        named = self.learner.policy.named_parameters()
        return {name: x.detach().cpu() for name, x in named if x.requires_grad}


def _state(answered: Answered) -> dict[str, Any]:
    found = answered.responses
    tensors = {"ids": found.ids, "mask": found.mask, "ended": found.ended, "logprob": found.logprob}
    return {"prompt_ids": answered.prompt_ids, "prompt_mask": answered.prompt_mask, "responses": tensors}


def _answered(state: Mapping[str, Any]) -> Answered:
    return Answered(state["prompt_ids"], state["prompt_mask"], Responses(**state["responses"]))


def _example(row: Mapping[str, Any]) -> Encoded:
    rejected = row["rejected"]
    return Encoded(**{**row, "rejected": None if rejected is None else _example(rejected)})
