"""When a run is evaluated, what is measured, and which of the measures it is steered by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from hybrid.core import InputError, check_seed, unknown_name
from hybrid.evaluate.text import TEXT_METRICS, check_text_metrics
from hybrid.objectives import Objective, objective_class, objective_names
from hybrid.rollout import SamplingConfig, make_decoder
from hybrid.run import better_end

__all__ = ["EvalConfig"]


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out examples: before the first step, after the last, and in between.

    The best checkpoint, early stopping and the scheduler reduce_on_plateau go by `metric`: any measure that an
    evaluation prints, such as sft_loss, reward, a text metric, reward/PART/raw_mean of a composite reward, or a measure
    of one of the mixture's objectives: dpo/accuracy, reward_model/ece.
    """

    every: int = 0  # steps between evaluations; 0: only before and after
    num_prompts: int = 64  # held-out prompts that are answered and scored
    num_examples: int = 256  # held-out examples of the validation loss
    batch_size: int = 32
    seed: int = 1234  # of the sampling: the same draws before and after
    temperature: float | None = None  # of the sampling; None: as in training; 0: the likeliest token
    decoder: Any = None  # of the sampling (docs/decoding.md); None: as in training
    text_metrics: tuple[str, ...] = ()  # of bleu, chrf, rouge_l, token_f1, exact_match: responses against targets
    metric: str = "sft_loss"  # the one that is watched
    mode: Literal["auto", "min", "max"] = "auto"  # which end of it is the better; auto: the one that is known
    patience: int | None = None  # evaluations in a row without progress that end the run; None: none do
    min_delta: float = 0.0  # progress is to be better than the best so far by more than this

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("num_prompts", 1), ("num_examples", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"EvalConfig.{name} must be >= {least}, got {getattr(self, name)}")
        check_seed("EvalConfig.seed", self.seed)
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"EvalConfig.temperature must be >= 0 and finite, got {self.temperature}")
        if self.decoder is not None:
            made = make_decoder(self.decoder)
            object.__setattr__(self, "_decoder", made)
            object.__setattr__(self, "decoder", dict(self.decoder) if made is not self.decoder else made.spec())
        check_text_metrics(self.text_metrics)
        self._check_metric()
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"EvalConfig.patience must be >= 1, got {self.patience}")
        if self.patience is not None and not self.every:
            raise InputError(
                "eval.patience counts evaluations during training: set eval.every to the steps between them"
            )
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"EvalConfig.min_delta must be >= 0 and finite, got {self.min_delta}")

    def _check_metric(self) -> None:
        """Refuse (InputError) a metric that no evaluation has, and one of which nobody knows the better end."""
        objectives = _measuring_objectives()
        of_reward = self.metric.startswith("reward/")
        if self.objective not in objectives and self.metric not in self.measured(with_reward=True) and not of_reward:
            if self.metric in TEXT_METRICS:
                raise InputError(f"eval.metric {self.metric!r} is not measured: add it to eval.text_metrics")
            if self.objective in objective_names():
                raise InputError(
                    f"eval.metric {self.metric!r}: objective {self.objective!r} measures nothing of held-out examples; "
                    f"those that do are {', '.join(objectives)}"
                )
            known = {*self.measured(with_reward=True), *(f"{name}/accuracy" for name in objectives)}
            raise unknown_name("eval.metric", self.metric, known)
        if self.mode == "auto" and better_end(self.metric) is None:
            raise InputError(f"eval.metric {self.metric!r} has no better end of its own: set eval.mode to min or max")

    @property
    def objective(self) -> str | None:
        """Whose measure is watched: "dpo" of dpo/accuracy. None: no objective's."""
        name, slash, _ = self.metric.partition("/")
        return name if slash and name != "reward" else None

    def measured(self, *, with_reward: bool) -> set[str]:
        """The measures of an evaluation that has targets, by name, as far as they can be known before it."""
        names = {"sft_loss", "perplexity", *self.text_metrics}
        if with_reward or self.text_metrics:
            names |= {"kl", "distinct_2", "response_length", "eos_share"}
        return names | {"reward", "positive"} if with_reward else names

    def sampling(self, training: SamplingConfig) -> SamplingConfig:
        """How the held-out prompts are answered."""
        if self.temperature is None and self.decoder is None:
            return training
        # A decoder that is made already: what its reward has loaded stays.
        decoder = vars(self).get("_decoder", training.search)
        temperature = training.temperature if self.temperature is None else self.temperature
        return replace(training, temperature=temperature, decoder=decoder)

    @property
    def best(self) -> tuple[str, Literal["min", "max"]]:
        """The metric that is watched, and which end of it is the better."""
        better = better_end(self.metric) if self.mode == "auto" else self.mode
        assert better is not None  # or it would have been refused
        return self.metric, better

    def watched(self, metrics: Mapping[str, float]) -> float | None:
        """The watched metric of an evaluation; None where nobody asked for it. Raises InputError where it is missing.

        Prompts without targets have no sft_loss, the default: then no checkpoint is the best.
        """
        if self.metric not in metrics and (self.metric != "sft_loss" or self.patience is not None):
            raise InputError(
                f"eval.metric {self.metric!r} was not measured; this evaluation has {', '.join(metrics)} "
                "(the losses and the text metrics need held-out targets, an objective's measures held-out pairs)"
            )
        return metrics.get(self.metric)

    def improves(self, value: float, best: float | None) -> bool:
        """Whether the watched metric has made progress. What is not finite never has."""
        if best is None:
            return math.isfinite(value)
        sign = 1 if self.best[1] == "max" else -1
        return math.isfinite(value) and sign * (value - best) > self.min_delta


def _measuring_objectives() -> list[str]:
    """The objectives that have measures of their own."""
    return [name for name in objective_names() if objective_class(name).evaluate is not Objective.evaluate]
