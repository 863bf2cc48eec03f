"""What a reward may ask of the run that it is part of, and when the run tells it what happens."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hybrid.core import Batch, Encoded, Rollout

__all__ = ["Hooks", "Host", "Opponent", "Told"]


class Opponent(Protocol):
    """Somebody else who answers the run's prompts: the policy as it was, or another model."""

    def take(self) -> None:
        """Be the policy as it is now."""

    def answers(
        self, prompts: Sequence[Encoded | str], *, sampling: Any = None, generator: torch.Generator | None = None
    ) -> list[str]:
        """A response to each, as rewards read it: behind its hint, without special tokens."""

    def state_dict(self) -> dict[str, Tensor]:
        """The weights themselves, no copies; none where it is still the policy as it is, or a model that stays."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave. Weights that are its own already are not copied."""


class Host(Protocol):
    """What the run gives its reward (`Reward.attach`)."""

    @property
    def num_held_out(self) -> int:
        """Held-out examples that the run has."""

    @property
    def eval_every(self) -> int:
        """Steps between the run's evaluations; 0: only before the first step and after the last."""

    def opponent(self, name: str | None) -> Opponent:
        """The policy as it is until the opponent's first `take`; or the model of that name."""

    def stream(self, number: int) -> torch.Generator:
        """Random numbers of the reward's own, which depend on the run's seed; on the policy's device."""

    def gram(self, sides: Sequence[tuple[Rollout | Batch, Tensor]]) -> Tensor:
        """The inner products of policy gradients, (K, K) float64 on the CPU: G_ij = <g_i, g_j>.

            g = the gradient, by the policy's weights that are trained, of
                sum over rows b and tokens t of  A_b log pi(token t of b) / number of tokens

        sides: K times rows and their advantages A, (B,); of a Batch the trained tokens.
        Leaves the policy's .grad, mode and random numbers as they are; dropout is off.
        """

    def held_out(self, num_rows: int) -> Batch:
        """The first held-out examples with a target. Raises InputError where there is none."""


class Hooks:
    """What the run tells a reward; nothing of it needs an answer.

    The scores of a rollout come between `before_score` and `after_rollout`, those of an evaluation between
    `before_evaluation` and `after_evaluation`.
    """

    def inner_rewards(self) -> "Iterator[Hooks]":
        """The rewards that it is made of, which are told the same."""
        return iter(())

    @property
    def needs_whole_policy(self) -> bool:
        """Whether it copies or differentiates the policy, which one process alone can only with all of its weights."""
        return any(inner.needs_whole_policy for inner in self.inner_rewards())

    def attach(self, host: Host) -> None:
        """The run's models are there. Once, before the first score; raises InputError for what the host lacks."""
        for inner in self.inner_rewards():
            inner.attach(host)

    def before_score(self, examples: Sequence[Encoded], sampling: Any) -> None:
        """The next batch answers these examples, a row each, with these sampling settings."""
        for inner in self.inner_rewards():
            inner.before_score(examples, sampling)

    def after_rollout(self, rollout: Rollout) -> None:
        """The rollout has its scores, and will be learnt from; the policy is still what answered."""
        for inner in self.inner_rewards():
            inner.after_rollout(rollout)

    def before_evaluation(self, seed: int) -> None:
        """The next scores measure the policy. `load_state_dict` will put the state back, random streams too.

        seed: that of the policy's own draws. What a reward draws meanwhile it draws by another that depends on this.
        """
        for inner in self.inner_rewards():
            inner.before_evaluation(seed)

    def after_evaluation(self, rollouts: Sequence[Rollout]) -> None:
        """That is over, and the state is what it was before. Nothing that is saved may change here either."""
        for inner in self.inner_rewards():
            inner.after_evaluation(rollouts)

    def evaluated(self) -> None:
        """The evaluation was one of the run's own: what a reward learns from the last one it learns now."""
        for inner in self.inner_rewards():
            inner.evaluated()


class Told:
    """The examples of the batch that is scored next, found by what a reward is given of them."""

    def __init__(self) -> None:
        self.sampling: Any = None
        self._examples: dict[tuple[int, str], list[Encoded]] = {}

    def take(self, examples: Sequence[Encoded], sampling: Any) -> None:
        """Forget the last batch's, and take these."""
        self.sampling, self._examples = sampling, {}
        for example in examples:
            # While it is kept here, no other item gets its id.
            self._examples.setdefault((id(example.item), example.prompt), []).append(example)

    def of(self, prompts: Sequence[str], items: Sequence[Any]) -> list[Encoded | str]:
        """For each row its example; the prompt alone where nobody told of one. Of equal rows each gets its own."""
        seen: dict[tuple[int, str], int] = {}
        found: list[Encoded | str] = []
        for prompt, item in zip(prompts, items, strict=True):
            key = id(item), prompt
            examples = self._examples.get(key)
            found.append(prompt if examples is None else examples[seen.get(key, 0) % len(examples)])
            seen[key] = seen.get(key, 0) + 1
        return found
