"""One arm of a suite: train it, and measure what came out on the test set."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.suites.data import Rows
from hybrid import Batch, Encoded, HybridConfig, HybridTrainer, Policy, ReferenceConfig, Rollout
from hybrid.core import IGNORE
from hybrid.evaluate import distinct_n, evaluate_sft

__all__ = ["LengthDrawn", "corpus_windows", "measured", "trained"]

LONGEST_WINDOW = 1024  # tokens, GPT-2's context: RL4LMs' choice


class LengthDrawn(HybridTrainer):
    """A trainer whose rollouts have lengths drawn from range(*response_tokens), one for each rollout."""

    def __init__(self, *given: Any, response_tokens: tuple[int, int], **options: Any):
        super().__init__(*given, **options)
        self._lengths, self._draw = response_tokens, random.Random(self.config.run.seed)

    def rollout(self, prompts: Batch | Sequence[Any], **options: Any) -> Rollout:
        config = self.config
        sampling = replace(config.sampling, max_new_tokens=self._draw.randrange(*self._lengths))
        self.config = replace(config, sampling=sampling)
        try:
            return super().rollout(prompts, **options)
        finally:
            self.config = config


def trained(
    stages: Sequence[dict[str, Any]],
    config: HybridConfig,
    tokenizer: Any,
    rows: Rows,
    *,
    response_tokens: tuple[int, int] | None = None,
) -> Policy | str:
    """The policy after the stages, each a run of its own `mixing`; the model's name where there is none."""
    policy: Any = config.model.name
    for mixing in stages:
        given = {"tokenizer": tokenizer, "train_data": rows, "config": replace(config, mixing=mixing)}
        if response_tokens is None:
            trainer = HybridTrainer(policy, **given)
        else:
            trainer = LengthDrawn(policy, response_tokens=response_tokens, **given)
        trainer.train()
        policy = trainer.policy
    return policy


def measured(
    policy: Policy | str, config: HybridConfig, tokenizer: Any, rows: Rows, text: str | None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The measures of `HybridTrainer.evaluation` and distinct_1, and the responses. kl: to the model that all arms
    start from.

    text: perplexity is that of this text (see `corpus_windows`); None: of the rows' targets.
    Each seed of a run has its own draws.
    """
    config = replace(
        config,
        references=(ReferenceConfig(model=config.model.name),),
        eval=replace(config.eval, seed=config.eval.seed + config.run.seed),
    )
    trainer = HybridTrainer(policy, tokenizer, eval_data=rows, config=config)
    metrics, samples = trainer.evaluation()
    metrics["distinct_1"] = distinct_n([sample["response"] for sample in samples], 1)
    if text is not None:
        windows = corpus_windows(text, tokenizer, trainer.policy.backbone.context_length)
        with trainer.autocast():
            found = evaluate_sft(trainer.policy, windows, batch_size=config.eval.batch_size)
        metrics["perplexity"] = found["perplexity"]
    return metrics, samples


def corpus_windows(text: str, tokenizer: Any, context: int | None) -> list[Encoded]:
    """A long text as windows of at most 1024 tokens (and the model's context), each half a window further.

    Every token is to be predicted once, after at least half a window of the tokens before it; of the first window all
    but the first token.
    Source: Perplexity of rl4lms/envs/text_generation/metric.py (stride 512, test texts joined by blank lines), and
    the guide of Hugging Face transformers that it follows.
    """
    longest = min(context or LONGEST_WINDOW, LONGEST_WINDOW)
    stride = longest // 2
    ids = tokenizer(text, verbose=False)["input_ids"]
    windows = []
    for start in range(0, len(ids), stride):
        begin, end = max(start + stride - longest, 0), min(start + stride, len(ids))
        labels = [IGNORE] * (start - begin) + ids[start:end]
        windows.append(Encoded(tuple(ids[begin:end]), tuple(labels), (), "", "", {}))
    return windows
