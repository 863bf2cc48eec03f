"""A sum of rewards whose weights are learnt while the policy is."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hybrid.core import InputError, Rollout
from hybrid.rewards.base import Answers, Reward, Row, register_reward
from hybrid.rewards.compose import Component, WeightedSum
from hybrid.rewards.controllers import (
    balance,
    check_upgrad,
    cosines_to_last,
    covariance_gain,
    exp3,
    floored,
    hedge,
    min_norm,
    upgrad,
)
from hybrid.rewards.host import Host
from hybrid.rewards.moments import Moments
from hybrid.rewards.output import Part
from hybrid.rewards.samples import Samples

__all__ = ["Mixture"]

Controller = Literal["hedge", "exp3", "balance", "gradient", "meta"]
BY_EVALUATION = ("hedge", "exp3", "meta")  # those that a held-out metric leads
METRIC = "metric"  # the part that it is in logs


@register_reward("mixture")
class Mixture(WeightedSum):
    """Σ w z / Σ w over the components, their weights w learnt on line: a simplex with a floor, from the given ones on.

    z is a component's score minus its running mean, over its running deviation (those of training batches, `decay` for
    the older ones), so that weights mean something whatever the scales; under `balance` the score itself.

        balance    w_i ~ start_i / running deviation of i's scores
        hedge      after each evaluation w_i *= exp(eta corr(metric, z_i)) over the held-out responses: how much the
                   metric grows to first order where the policy is tilted towards i (`controllers.covariance_gain`)
        exp3       from one evaluation to the next a single component, drawn by the weights, is the reward; then
                   w_i *= exp(eta rise / (K w_i)), rise: of the mean held-out metric, over the largest one so far
        gradient   after each rollout the weights that `aggregator` gives for the components' policy gradients
        meta       after each rollout w_i *= exp(eta cos(g_i, g)), g the gradient of the held-out metric by the
                   responses of the last evaluation, or with metric "sft_loss" of the held-out loss, falling

    metric: a reward, scored on held-out responses alone; for hedge, exp3 and meta.   floor: the least weight.
    eta: the step of the log-weights.   rows: of a rollout, those whose gradients are compared: K of the size of what is
    trained are in memory then. A component whose gradient is 0 stands at the floor.   seed: of exp3's draws.
    Weights, moments and random numbers are saved in checkpoints; an evaluation changes none of them while it scores.
    Logged at each component: `weight`, and `gain`, what last moved it.
    """

    inner_specs: ClassVar[Mapping[str, tuple[str, ...]]] = {METRIC: ("sft_loss",)}

    def __init__(
        self,
        components: list[Component],
        controller: Controller = "hedge",
        metric: Component | Literal["sft_loss"] | None = None,
        floor: float = 0.05,
        eta: float = 0.2,
        aggregator: Literal["mgda", "upgrad"] = "mgda",
        rows: int = 16,
        decay: float = 0.9,
        seed: int = 0,
    ):
        super().__init__(components)
        _check_settings(controller, metric, floor, eta, rows, decay, len(components), names=self.components)
        if aggregator == "upgrad":
            if controller != "gradient":
                raise InputError(f"aggregator means nothing with controller {controller!r}; leave it out")
            check_upgrad()
        total = math.fsum(component.weight for component in components)
        if any(component.weight < 0 for component in components) or not total:
            raise InputError("components must have weights of at least 0, and not all 0: they are where it starts")
        self.controller, self.floor, self.eta, self.aggregator, self.rows = controller, floor, eta, aggregator, rows
        self._metric: Reward | None = metric.reward if isinstance(metric, Component) else None
        self._start = [component.weight / total for component in components]
        self.weights = floored(self._start, floor)
        self._moments = [Moments(decay) for _ in components]
        self._gains: list[float] = []  # of the last update, for the log
        self._arm: int | None = None  # of exp3, what is tried
        self._mean_before: float | None = None  # the metric at the last evaluation
        self._largest_rise = 0.0
        self._random = torch.Generator().manual_seed(seed)
        self._held: dict[str, Any] = {}  # the held-out responses that meta's gradient is of
        self._host: Host | None = None
        self._evaluating = False
        # Not part of the state: what the last batch, and the last evaluation, have shown.
        self._scored: dict[tuple[str, str], list[float | None]] = {}
        self._seen: list[tuple[list[list[Row]], list[Row], Samples]] = []
        self._held_next: dict[str, Any] = {}

    # What the run tells it

    def inner_rewards(self) -> Iterator[Reward]:
        yield from super().inner_rewards()
        if self._metric is not None:
            yield self._metric

    @property
    def needs_whole_policy(self) -> bool:
        return self.controller in ("gradient", "meta") or super().needs_whole_policy

    def attach(self, host: Host) -> None:
        super().attach(host)
        self._host = host
        if self.controller not in BY_EVALUATION:
            return
        if not host.num_held_out:
            raise InputError(
                f"reward {self.component_name!r} learns its weights from held-out data, and there are none: give "
                "eval_data, data.eval or data.eval_fraction, or take controller balance or gradient"
            )
        if self._metric is None:
            host.held_out(1)
        elif not host.eval_every:
            warnings.warn(
                f"reward {self.component_name!r} learns its weights at evaluations, and eval.every is 0: they will "
                "hardly move; set eval.every to the steps between them",
                stacklevel=2,
            )

    def before_evaluation(self, seed: int) -> None:
        super().before_evaluation(seed)
        self._evaluating, self._seen = True, []

    def before_score(self, examples: Sequence[Any], sampling: Any) -> None:
        super().before_score(examples, sampling)
        greedy = getattr(sampling, "temperature", 1.0) == 0
        if self._evaluating and greedy and self.controller == "meta" and self._metric is not None:
            raise InputError(
                f"reward {self.component_name!r}: a greedy answer has no policy gradient; leave eval.temperature out, "
                "or set metric: sft_loss"
            )

    def after_evaluation(self, rollouts: Sequence[Rollout]) -> None:
        super().after_evaluation(rollouts)
        self._evaluating = False
        if self.controller == "meta" and self._metric is not None and rollouts:
            scores = {
                sample: [row if isinstance(row, float) else None]
                for _, metric, samples in self._seen
                for sample, row in zip(zip(samples.prompts, samples.responses, strict=True), metric, strict=True)
            }
            picked = rollouts[0][: self.rows]
            (advantage,) = _advantages(rollouts[0], len(picked), scores, 1, self.handling.max_chars)
            self._held_next = {
                "input_ids": picked.input_ids.cpu(), "attention_mask": picked.attention_mask.cpu(),
                "mask": picked.mask.cpu(), "temperature": float(picked.temperature), "advantage": advantage,
            }  # fmt: skip

    def evaluated(self) -> None:
        super().evaluated()
        if self.controller == "meta":
            self._held = self._held_next
        elif self.controller == "hedge":
            self._learn([self._held_out_gain(i) for i in range(len(self.weights))])
        elif self.controller == "exp3":
            self._try_another()

    def after_rollout(self, rollout: Rollout) -> None:
        super().after_rollout(rollout)
        if self.controller == "gradient":
            self._learn_from_gradients(rollout)
        elif self.controller == "meta" and (self._held or self._metric is None):
            self._learn([*cosines_to_last(self._gram(rollout, held_out=True))])

    # What it learns from that

    def _learn(self, gains: list[float]) -> None:
        self._gains = gains
        self.weights = hedge(self.weights, gains, eta=self.eta, floor=self.floor)

    def _held_out_gain(self, component: int) -> float:
        pairs = [
            (m, z)
            for columns, metric, _ in self._seen
            for m, z in zip(metric, columns[component], strict=True)
            if isinstance(m, float) and isinstance(z, float)
        ]
        return covariance_gain([m for m, _ in pairs], [z for _, z in pairs])

    def _try_another(self) -> None:
        scores = [m for _, metric, _ in self._seen for m in metric if isinstance(m, float)]
        if not scores:
            return
        mean, before = fmean(scores), self._mean_before
        self._mean_before = mean
        if before is not None and self._arm is not None:
            self._largest_rise = max(self._largest_rise, abs(mean - before))
            gain = (mean - before) / self._largest_rise if self._largest_rise else 0.0
            self._gains = [gain if i == self._arm else 0.0 for i in range(len(self.weights))]
            self.weights = exp3(self.weights, self._arm, gain, eta=self.eta, floor=self.floor)
        self._draw_arm()

    def _draw_arm(self) -> int:
        odds = torch.tensor(self.weights, dtype=torch.float64)
        self._arm = int(torch.multinomial(odds, 1, generator=self._random))
        return self._arm

    def _learn_from_gradients(self, rollout: Rollout) -> None:
        gram = self._gram(rollout)
        moving = [i for i, length in enumerate(gram.diagonal().tolist()) if length > 0]
        if moving:
            found = (min_norm if self.aggregator == "mgda" else upgrad)(gram[moving][:, moving])
            placed = dict(zip(moving, found, strict=True))
            self.weights = floored([placed.get(i, 0.0) for i in range(len(gram))], self.floor)

    def _gram(self, rollout: Rollout, *, held_out: bool = False) -> Tensor:
        """Of the components' policy gradients on the first rows of a rollout, and last of the held-out one."""
        assert self._host is not None, "a rollout comes from a run"
        picked = rollout[: self.rows]
        advantages = _advantages(rollout, len(picked), self._scored, len(self.weights), self.handling.max_chars)
        sides: list[tuple[Any, Tensor]] = [(picked, advantage) for advantage in advantages]
        if held_out and self._metric is None:
            batch = self._host.held_out(self.rows)
            sides.append((batch, torch.ones(len(batch))))
        elif held_out:
            sides.append((_answers_alone(self._held), self._held["advantage"]))
        return self._host.gram(sides)

    # The score

    def _ask(self, samples: Samples) -> Answers:
        columns, parts = self._run_each(samples, self.components)
        numbers = [[row for row in column if isinstance(row, float)] for column in columns]
        for moments, scores in zip(self._moments, numbers, strict=True):
            # An evaluation goes by training's; before there is any, by its first batch's, which the run puts back.
            if not self._evaluating or not moments.is_known:
                moments.take(scores)
        if self.controller == "balance":
            if not self._evaluating:
                deviations = [moments.deviation for moments in self._moments]
                self.weights = balance(self._start, deviations, floor=self.floor)
            measured = columns
        else:
            measured = [
                [moments.standardised(row) if isinstance(row, float) else row for row in column]
                for moments, column in zip(self._moments, columns, strict=True)
            ]
        shown = dict(zip(self.components, self.weights, strict=True))
        rows = self._mixed(measured, samples, parts)
        for index, name in enumerate(self.components):
            parts[name].counts["weight"] = shown[name]
            if self._gains:
                parts[name].counts["gain"] = self._gains[index]
        if self._evaluating:
            parts |= self._measured_metric(measured, samples)
        elif self.controller in ("gradient", "meta"):
            keys = zip(samples.prompts, samples.responses, strict=True)
            found = [[row if isinstance(row, float) else None for row in rows] for rows in zip(*measured, strict=True)]
            self._scored = dict(zip(keys, found, strict=True))
        return Answers(rows, parts, {})

    def _mixed(self, measured: list[list[Row]], samples: Samples, parts: dict[str, Part]) -> list[Row]:
        """The rows of the whole; says in the parts what each component adds to them."""
        weights = self.weights
        if self.controller == "exp3" and not self._evaluating:
            arm = self._draw_arm() if self._arm is None else self._arm
            for index, name in enumerate(self.components):
                parts[name].counts["chosen"] = float(index == arm)
            # What is not tried takes no part.
            measured = [
                column if index == arm else [None if isinstance(row, float) else row for row in column]
                for index, column in enumerate(measured)
            ]
        self._say_weighted(measured, weights, parts)
        return self._rows_of(measured, weights, samples.responses)

    def _say_weighted(self, measured: list[list[Row]], weights: list[float], parts: dict[str, Part]) -> None:
        for row, scores in enumerate(zip(*measured, strict=True)):
            total = math.fsum(w for w, score in zip(weights, scores, strict=True) if isinstance(score, float))
            for name, w, score in zip(self.components, weights, scores, strict=True):
                parts[name].weighted[row] = w * score / (total or 1.0) if isinstance(score, float) else None

    def _measured_metric(self, measured: list[list[Row]], samples: Samples) -> dict[str, Part]:
        if self._metric is None:
            return {}
        rows, part, inner = self._metric._run(samples)
        self._seen.append((measured, rows, samples))
        return {METRIC: part, **{f"{METRIC}/{name}": inner_part for name, inner_part in inner.items()}}

    # Its state

    def _state(self) -> dict[str, Any]:
        return {
            "components": super()._state(),
            METRIC: None if self._metric is None else self._metric.state_dict(),
            "weights": list(self.weights),
            "moments": [moments.state() for moments in self._moments],
            "gains": list(self._gains),
            "arm": self._arm,
            "mean_before": self._mean_before,
            "largest_rise": self._largest_rise,
            "random": self._random.get_state(),
            "held": dict(self._held),
        }

    def _states_of_components(self, state: dict[str, Any]) -> dict[str, Any]:
        return state["components"]  # type: ignore[no-any-return]

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        if self._metric is not None:
            self._metric.load_state_dict(state[METRIC])
        for moments, saved in zip(self._moments, state["moments"], strict=True):
            moments.load(saved)
        self.weights, self._gains = list(state["weights"]), list(state["gains"])
        self._arm, self._mean_before = state["arm"], state["mean_before"]
        self._largest_rise, self._held = state["largest_rise"], dict(state["held"])
        self._random.set_state(state["random"])


def _check_settings(
    controller: str, metric: Any, floor: float, eta: float, rows: int, decay: float, count: int, *, names: Any
) -> None:
    if count < 2:
        raise InputError(f"components must be at least two to have weights among each other, got {count}")
    if METRIC in names:
        raise InputError(f"components must not be called {METRIC!r}, which is the held-out one: give it another name")
    if controller in BY_EVALUATION and metric is None:
        raise InputError(
            f"mixture without a held-out metric: controller {controller!r} learns from one; give metric: "
            "{type: ...}" + (" or metric: sft_loss" if controller == "meta" else "")
        )
    if controller not in BY_EVALUATION and metric is not None:
        raise InputError(f"metric means nothing with controller {controller!r}, which learns from no evaluation")
    if metric == "sft_loss" and controller != "meta":
        raise InputError(f"metric 'sft_loss' is for controller 'meta': {controller!r} needs a score for each response")
    if not 0 <= floor * count < 1:
        raise InputError(f"floor must be >= 0 and below 1 / {count}, the components' share, got {floor}")
    if controller == "exp3" and not floor:
        raise InputError("floor must be > 0 with controller 'exp3': it divides by the weights, got 0")
    if not 0 < eta < math.inf:
        raise InputError(f"eta must be > 0 and finite, got {eta}")
    if rows < 2:
        raise InputError(f"rows must be at least 2, which can differ, got {rows}")
    if not 0 <= decay < 1:
        raise InputError(f"decay must lie in [0, 1), got {decay}")


def _advantages(
    rollout: Rollout,
    num_rows: int,
    scores: Mapping[tuple[str, str], Sequence[float | None]],
    count: int,
    max_chars: int | None,
) -> list[Tensor]:
    """Each of `count` scores of the rollout's first rows, whitened over these, (num_rows,) each; 0 without a score.

    scores: by prompt and response, as the reward has seen them, cut to `max_chars`.
    """
    texts = zip(rollout.prompts[:num_rows], rollout.responses[:num_rows], strict=True)
    samples = [(prompt[:max_chars], response[:max_chars]) for prompt, response in texts]
    table = [scores.get(sample, [None] * count) for sample in samples]
    return [_whitened([row[i] for row in table]) for i in range(count)]


def _whitened(scores: Sequence[float | None]) -> Tensor:
    known = [score for score in scores if score is not None]
    deviation = pstdev(known) if known else 0.0
    if deviation <= 1e-9 * max(1.0, abs(fmean(known)) if known else 0.0):
        return torch.zeros(len(scores))
    mean = fmean(known)
    return torch.tensor([0.0 if score is None else (score - mean) / deviation for score in scores])


def _answers_alone(held: Mapping[str, Any]) -> Rollout:
    """A rollout that holds prompts and answers, and zeros for all that PPO would learn from."""
    mask = held["mask"]
    nothing, none = torch.zeros(mask.shape), torch.zeros(len(mask))
    return Rollout(
        input_ids=held["input_ids"], attention_mask=held["attention_mask"], mask=mask, old_logprob=nothing,
        old_value=nothing, ref_logprob=nothing.new_zeros(0, *mask.shape), kl=nothing, reward=nothing, entropy=nothing,
        score=none, ended=none.bool(), temperature=held["temperature"],
    )  # fmt: skip
