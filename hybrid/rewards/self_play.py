"""A reward by contest: the policy against itself as it was, or against another model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch

from hybrid.core import Encoded, InputError, Rollout
from hybrid.rewards.base import Answers, Reward, RewardError, Row, register_reward
from hybrid.rewards.compose import Component, Composite
from hybrid.rewards.host import Host, Opponent, Told
from hybrid.rewards.models import existing_model
from hybrid.rewards.samples import Samples
from hybrid.rewards.versus import Compares, Versus

__all__ = ["SelfPlay"]


@register_reward("self_play")
class SelfPlay(Composite):
    """1 where the response beats an opponent's to the same prompt, 0.5 for a draw, 0 for a defeat; by another reward.

        win       1 where d > tie, 0 where d < -tie, else 1/2      d = reward(ours) - reward(theirs)
        sigmoid   1 / (1 + exp(-d))

    reward: who judges. One that compares two answers (a judge) is asked about the pair for `win`, in both orders, and
        the mean of the two verdicts counts.
    opponent: a model's name; None: the policy as it was. Before the first snapshot that is the policy as it is.
    refresh: rollouts between two snapshots. They are made after a rollout: with 1 the opponent is the policy that
        answered in the last one.

    The opponent answers with the run's settings from random numbers of its own. Snapshot and random numbers are saved
    in checkpoints; an evaluation changes neither, and its opponent draws the same every time. A sample is skipped where
    the reward skips either side, and fails where it fails on one. In logs the reward's part has `win_rate`,
    `draw_share`, and `opponent_age` in rollouts; the part `opponent` is what it says of the other side.
    Source: the opponent that is the policy of an earlier iteration: SPIN, Chen et al. 2024 (arXiv:2401.01335), and
    self-play preference optimization, Wu et al. 2024 (arXiv:2405.00675).
    """

    inner_specs: ClassVar[Mapping[str, tuple[str, ...]]] = {"reward": ()}

    def __init__(
        self,
        reward: Component | None = None,
        opponent: str | None = None,
        refresh: int = 10,
        outcome: Literal["win", "sigmoid"] = "win",
        tie: float = 0.0,
    ):
        if reward is None:
            raise InputError("self_play without an inner reward: give one that judges, as reward: {type: ...}")
        if reward.weight != 1:
            raise InputError(f"reward.weight means nothing here: there is no other beside it, got {reward.weight}")
        if refresh < 1:
            raise InputError(f"refresh must be at least 1 rollout, got {refresh}")
        if not 0 <= tie < math.inf:
            raise InputError(f"tie must be >= 0 and finite, got {tie}")
        if tie and outcome != "win":
            raise InputError(f"tie means nothing with outcome {outcome!r}, which has no draw; got {tie}")
        super().__init__([reward])
        self.refresh, self.outcome, self.tie = refresh, outcome, tie
        self.opponent_name = None if opponent is None else existing_model(opponent, "opponent")
        ((self._inner_name, _),) = self.components.items()
        self._inner: Reward = reward.reward
        self._pairs = self._comparing(tie)
        self._opponent: Opponent | None = None
        self._stream: torch.Generator | None = None
        self._told = Told()
        self.age = 0  # rollouts since the opponent was the policy

    def _comparing(self, tie: float) -> Reward | None:
        if self.outcome != "win" or not isinstance(self._inner, Compares):
            return None
        if tie:
            raise InputError(
                f"tie is a difference of scores, and {self._inner_name!r} compares: leave it out, got {tie}"
            )
        if self._inner.handling.postprocess:
            raise InputError("reward.postprocess means nothing where a judge compares: leave it out")
        return self._inner.comparison()

    def inner_rewards(self) -> Iterator[Reward]:
        yield self._inner
        if self._pairs is not None:
            yield self._pairs

    @property
    def needs_whole_policy(self) -> bool:
        return self.opponent_name is None or super().needs_whole_policy

    def attach(self, host: Host) -> None:
        super().attach(host)
        self._opponent, self._stream = host.opponent(self.opponent_name), host.stream(0)

    def before_score(self, examples: Sequence[Encoded], sampling: Any) -> None:
        super().before_score(examples, sampling)
        self._told.take(examples, sampling)

    def after_rollout(self, rollout: Rollout) -> None:
        super().after_rollout(rollout)
        if self._opponent is None or self.opponent_name is not None:
            return
        if self.age in (0, self.refresh):
            self._opponent.take()
            self.age = 0
        self.age += 1

    def before_evaluation(self, seed: int) -> None:
        super().before_evaluation(seed)
        if self._stream is not None:
            # With the policy's own seed the two would say the same wherever they are the same.
            self._stream.manual_seed(seed + 1)

    def _ask(self, samples: Samples) -> Answers:
        theirs = samples._replace(responses=self._answers_of_the_other(samples))
        name = self._inner_name
        if self._pairs is not None:
            versus = [Versus(other, item) for other, item in zip(theirs.responses, samples.items, strict=True)]
            rows, part, _ = self._pairs._run(samples._replace(items=versus))
            parts = {name: part}
        else:
            ours, part, inner = self._inner._run(samples)
            others, other_part, _ = self._inner._run(theirs)
            rows = [self._result(*sides) for sides in zip(ours, others, strict=True)]
            nested = {f"{name}/{inner_name}": inner_part for inner_name, inner_part in inner.items()}
            parts = {name: part, **nested, "opponent": other_part}
        for error in {id(row): row for row in rows if isinstance(row, RewardError)}.values():
            error.add_note(f"It is the inner reward {name!r} of the reward {self.component_name!r}.")
        part.counts |= self._shares(rows)
        return Answers(rows, parts, {})

    def _answers_of_the_other(self, samples: Samples) -> list[str]:
        if self._opponent is None:
            raise InputError(
                f"reward {self.component_name!r} needs a run, whose policy and opponent answer the same prompts: score "
                f"with the learner's own (learner.reward), or use its inner reward {self._inner_name!r} alone"
            )
        examples = self._told.of(samples.prompts, samples.items)
        return self._opponent.answers(examples, sampling=self._told.sampling, generator=self._stream)

    def _result(self, ours: Row, theirs: Row) -> Row:
        for side in (ours, theirs):
            if not isinstance(side, float):
                return side
        assert isinstance(ours, float) and isinstance(theirs, float)
        difference = ours - theirs
        if self.outcome == "sigmoid":
            # Neither end of it overflows.
            return 0.5 + 0.5 * math.tanh(difference / 2)
        return 0.5 if abs(difference) <= self.tie else float(difference > 0)

    def _shares(self, rows: Sequence[Row]) -> dict[str, float]:
        """win_rate counts a draw as half a win; a verdict above 1/2 is a win."""
        results = [row for row in rows if isinstance(row, float)]
        shares = {} if self.opponent_name is not None else {"opponent_age": float(self.age)}
        if results:
            shares["draw_share"] = fmean(result == 0.5 for result in results)
            shares["win_rate"] = fmean(0.5 if result == 0.5 else float(result > 0.5) for result in results)
        return shares

    def _state(self) -> dict[str, Any]:
        return {
            "components": super()._state(),
            "opponent": {} if self._opponent is None else self._opponent.state_dict(),
            "stream": None if self._stream is None else self._stream.get_state(),
            "age": self.age,
        }

    def _states_of_components(self, state: dict[str, Any]) -> dict[str, Any]:
        return state["components"]  # type: ignore[no-any-return]

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self.age = state["age"]
        if self._opponent is not None and self._stream is not None:
            self._opponent.load_state_dict(state["opponent"])
            self._stream.set_state(state["stream"])
        elif state["opponent"] or state["stream"] is not None:
            raise InputError(f"reward {self.component_name!r} takes up a run's state only in a run (learner.reward)")
