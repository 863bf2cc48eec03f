"""What is looked at of a learner's policy: what it says, what it measures, and a folder of it."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from hybrid.core import InputError
from hybrid.distributed import World
from hybrid.evaluate import evaluate
from hybrid.mixing import Strategy
from hybrid.models import Reference
from hybrid.objectives import Objectives, autocast
from hybrid.rewards import Reward
from hybrid.rollout import Engine, SamplingConfig, respond, response_texts
from hybrid.supply import Supply

__all__ = ["Measured"]

Metrics = dict[str, float]


class Measured(Supply):
    """Nothing here changes the policy."""

    world: World
    references: list[Reference]
    reward: Reward | None
    strategy: Strategy
    objectives: Objectives
    engine: Engine
    tokenizer: Any
    speaker: torch.Generator

    def generate(self, texts: Sequence[str], sampling: SamplingConfig | None = None) -> list[str]:
        """One response for each text, which goes through the data's prompt template first."""
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise InputError(f"generate takes a list of texts, got {texts!r:.60}; [text] is a list of one")
        sampling = sampling or self.config.sampling
        examples, size = self.shown([self.corpus.prompt(text) for text in texts]), self.config.eval.batch_size
        answers: list[str] = []
        with self.world.gathered(), self.autocast():
            for start in range(0, len(examples), size):
                *_, responses = respond(
                    self.engine, examples[start : start + size], tokenizer=self.tokenizer,
                    sampling=sampling, generator=self.speaker, reward=self.reward,
                )  # fmt: skip
                answers += response_texts(self.tokenizer, responses, stop=sampling.stop)
        return answers

    def evaluate(self) -> Metrics:
        """The held-out measures of `hybrid.evaluate`, on the same prompts with the same draws every time."""
        return self.evaluation()[0]

    def evaluation(self) -> tuple[Metrics, list[dict[str, Any]]]:
        """What `evaluate` measures, and the responses that it measured, a row each.

        The measures of objectives go by their names: "dpo/accuracy"; their rows have an `objective`.
        """
        config = self.config.eval
        with self.world.gathered(), self.autocast():
            metrics, rows = evaluate(
                self.policy, self.references, self.reward, self.corpus.eval, config, tokenizer=self.tokenizer,
                sampling=self.config.sampling, engine=self.engine, shown=self.shown,
            )  # fmt: skip
            held_out = self.corpus.held_out_preferences[: config.num_examples]
            for name in sorted({*self.strategy.objectives, *self.objectives}):
                found = self.objectives[name].evaluate(held_out, config.batch_size)
                metrics |= {f"{name}/{measure}": value for measure, value in found.metrics.items()}
                rows += [{"objective": name, **row} for row in found.rows]
        return metrics, rows

    def save(self, folder: str | Path) -> None:
        """Write policy and tokenizer as a plain transformers folder, the value head beside them."""
        with self.world.gathered():
            self.world.main(lambda: self.policy.save_pretrained(folder, tokenizer=self.tokenizer))

    def autocast(self) -> AbstractContextManager[Any]:
        """Computation in `model.precision`; the weights keep their dtype."""
        return autocast(self.config.model.precision, self.policy.device)
