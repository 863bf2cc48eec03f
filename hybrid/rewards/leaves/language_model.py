"""Rewards from how likely a language model finds the response: perplexity, fluency, gptscore."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hybrid.core import InputError, unknown_name
from hybrid.functional.logprob import IGNORE
from hybrid.fused import token_stats
from hybrid.rewards.base import register_reward
from hybrid.rewards.fit import count_cut
from hybrid.rewards.models import ModelReward, pretrained, shared
from hybrid.rewards.samples import Samples

__all__ = ["Fluency", "GPTScore", "Perplexity"]

RewardMode = Literal["exp_neg_loss", "neg_loss", "inverse", "raw"]

# What one forward pass may hold: 512 MiB of logits in float32, and no more tokens than a small model's
# activations leave room for.
LOGITS_PER_FORWARD = 2**27
TOKENS_PER_FORWARD = 2**12
# Logits that are turned into log-probabilities at a time: the few copies that takes stay at 64 MiB each.
LOGITS_PER_SLICE = 2**24
# Tokens times parameters of one text: a longer one is cut there, or after four windows if that is more, which takes
# 20 s on one core with 135M parameters. A model below a million parameters reads 100,000 characters to their end.
LONGEST = 5 * 10**11
# exp(36) is still a score.
MAX_LOSS = 36.0


class Tokens(NamedTuple):
    """A text as tokens. start: the first that is scored; those before it are only context."""

    ids: list[int]
    start: int = 0


@dataclass
class LanguageModelReward(ModelReward[tuple[Any, Any]]):
    """What the rewards here share: the model, and the window that it is moved over a long text."""

    model: str = "gpt2"  # a causal language model: a hub name or a folder
    stride: int = 512
    max_length: int = 1024
    device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise InputError(f"max_length must be at least 2, got {self.max_length}")
        if not 1 <= self.stride <= self.max_length:
            raise InputError(f"stride must be from 1 to max_length ({self.max_length}), got {self.stride}")

    def _load(self, device: torch.device) -> tuple[Any, Any]:
        return shared(_language_model, self.model, device)

    def _model_scores(self, loaded: tuple[Any, Any], samples: Samples) -> Sequence[float]:
        tokenizer, model = loaded
        losses = self._losses(model, self._tokens(tokenizer, samples))
        worst = math.log(model.config.get_text_config().vocab_size)
        return [
            self._of_loss(worst, True) if loss is None or not response.strip() else self._of_loss(loss, False)
            for loss, response in zip(losses, samples.responses, strict=True)
        ]

    def _tokens(self, tokenizer: Any, samples: Samples) -> list[Tokens]:
        """The tokens of each sample, with those special ones that the tokenizer itself adds."""
        return [Tokens(ids) for ids in tokenizer(samples.responses, verbose=False).input_ids]

    def _of_loss(self, loss: float, empty: bool) -> float:
        raise NotImplementedError(f"{type(self).__name__} must implement _of_loss")

    def _losses(self, model: Any, texts: list[Tokens]) -> list[float | None]:
        """Mean negative log-likelihood of the scored tokens of each text, nats; None where there is none."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or self.max_length
        max_length, stride = min(self.max_length, context), min(self.stride, context)
        longest = max(4 * max_length, LONGEST // model.num_parameters())
        # Of a long rubric the last tokens see only its end.
        count_cut(sum(len(ids) > (max_length if start else longest) for ids, start in texts))
        texts = [Tokens(ids[: start + longest], start) for ids, start in texts]
        windows = [(i, window) for i, text in enumerate(texts) for window in _windows(text, max_length, stride)]
        total, count = [0.0] * len(texts), [0] * len(texts)
        for (i, window), logprob in zip(windows, _logprobs(model, [w for _, w in windows]), strict=True):
            total[i] -= logprob
            count[i] += len(window.ids) - window.start
        return [nll / n if n else None for nll, n in zip(total, count, strict=True)]


@register_reward("perplexity")
@dataclass
class Perplexity(LanguageModelReward):
    """Perplexity of the response to a language model, by default as 1 / perplexity so that fluent scores high.

        loss = mean over the tokens of -log p(token | those before it), nats;   perplexity = exp(loss)

        exp_neg_loss   exp(-loss), 0 to 1       inverse   1 / perplexity: the same number by its other name
        neg_loss       -loss, at most 0         raw       the perplexity itself, low for a fluent text

    A long text is read in windows of `max_length` tokens (at most the model's context), each `stride` further.
    A token is scored once, in the first window that holds it; the first of a window that overlaps no other has
    no context and is not scored. So a text's first token counts only if the tokenizer puts one before it (BOS).
    With no token to score, or a blank text: 0 by exp_neg_loss and inverse; by neg_loss and raw what a uniform
    guess gets, -log V and V of a vocabulary of V. A model of over 100M parameters reads no more than four windows.
    Source: "Perplexity of fixed-length models", the guide of Hugging Face transformers.
    """

    reads = ("response",)

    reward_mode: RewardMode = "exp_neg_loss"

    def _of_loss(self, loss: float, empty: bool) -> float:
        return _in_mode(self.reward_mode, loss, empty)


@register_reward("fluency")
@dataclass
class Fluency(LanguageModelReward):
    """Fluency of the response: its perplexity to a language model against a reference; 0 to 1.

        1 / (1 + perplexity / reference) = sigmoid(log reference - loss)

    Unlike 1 / perplexity, which is below 0.05 for most good texts, it spreads fluent texts over the upper half:
    with GPT-2's vocabulary, prose has a perplexity of 20 to 60, and shuffled words have over 1000. Perplexity is
    of windows, as in `perplexity`. A blank text, or one with no token to score, is 0.
    """

    reads = ("response",)

    reference: float = 100.0  # the perplexity that scores 0.5; a choice, between prose and shuffled words

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.reference < math.inf:
            raise InputError(f"reference must be a perplexity, at least 1 and finite, got {self.reference}")

    def _of_loss(self, loss: float, empty: bool) -> float:
        return 0.0 if empty else 1 / (1 + math.exp(min(loss, MAX_LOSS)) / self.reference)


@register_reward("gptscore")
@dataclass
class GPTScore(LanguageModelReward):
    """Mean log-likelihood of the response's tokens after a rubric, to a language model; by default at most 0.

        1/n sum_t log p(response_t | rubric, response_<t)

    The rubric holds the aspect and, at {prompt} and {target}, the sample's texts, which are taken as they are.
    The response follows it directly and is tokenized by itself. `reward_mode` as in `perplexity`. What does not
    fit into `max_length` tokens is read in windows, and then the rubric's beginning falls out of them.
    Source: Fu et al. 2023, "GPTScore: Evaluate as You Desire" (arXiv:2302.04166), with equal weights.
    """

    reads = ("response", "target", "prompt")

    rubric: str = "Give a correct, relevant and fluent answer.\n\n{prompt}\n\nAnswer:\n"
    reward_mode: RewardMode = "neg_loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs_target = "target" in PLACEHOLDER.findall(self.rubric)
        for name in PLACEHOLDER.findall(self.rubric):
            if name not in ("prompt", "target"):
                raise InputError(f"rubric: {unknown_name('placeholder', name, ['prompt', 'target'])}")

    def _tokens(self, tokenizer: Any, samples: Samples) -> list[Tokens]:
        rubrics = [self._rubric(prompt=p, target=t) for p, t in zip(samples.prompts, samples.targets, strict=True)]
        before = tokenizer(rubrics, verbose=False).input_ids
        after = tokenizer(samples.responses, add_special_tokens=False, verbose=False).input_ids
        return [Tokens(b + a, start=len(b)) for b, a in zip(before, after, strict=True)]

    def _rubric(self, **texts: str) -> str:
        # In one pass: a "{target}" in the prompt's text is text.
        return PLACEHOLDER.sub(lambda match: texts[match[1]], self.rubric)

    def _of_loss(self, loss: float, empty: bool) -> float:
        return _in_mode(self.reward_mode, loss, empty)


PLACEHOLDER = re.compile(r"\{(\w*)\}")


def _in_mode(mode: RewardMode, loss: float, empty: bool) -> float:
    if mode == "neg_loss":
        return -loss
    if mode == "raw":
        return math.exp(min(loss, MAX_LOSS))
    return 0.0 if empty else math.exp(-loss)


def _language_model(name: str, device: torch.device) -> tuple[Any, Any]:
    tokenizer, model = pretrained("AutoModelForCausalLM", name, device)
    # Half precision is slow on a CPU, and a text's score would depend on its neighbours in the batch.
    return tokenizer, model.float() if device.type == "cpu" else model


def _windows(text: Tokens, max_length: int, stride: int) -> Iterator[Tokens]:
    """The windows of a text that hold tokens to score, each token in the first that has context for it."""
    scored = text.start
    for begin in range(0, len(text.ids), stride):
        end = min(begin + max_length, len(text.ids))
        start = max(scored, begin + 1)
        if start < end:
            yield Tokens(text.ids[begin:end], start - begin)
        scored = max(scored, end)
        if end == len(text.ids):
            break


def _logprobs(model: Any, windows: list[Tokens]) -> list[float]:
    """The sum of the log-probabilities of each window's scored tokens; many windows share a forward pass."""
    vocab_size = model.config.get_text_config().vocab_size
    room = min(TOKENS_PER_FORWARD, LOGITS_PER_FORWARD // vocab_size)
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    sums = [0.0] * len(windows)
    batch: list[int] = []
    for position, i in enumerate(order):
        batch.append(i)
        following = order[position + 1 : position + 2]
        if not following or (len(batch) + 1) * len(windows[following[0]].ids) > room:
            for row, logprob in zip(batch, _forward(model, [windows[j] for j in batch]).tolist(), strict=True):
                sums[row] = logprob
            batch = []
    return sums


def _forward(model: Any, windows: list[Tokens]) -> Tensor:
    """The sum of the log-probabilities of each window's scored tokens, (N,) float64, in one forward pass."""
    longest = max(len(window.ids) for window in windows)
    ids = torch.zeros(len(windows), longest, dtype=torch.long)  # padded at the end, where nothing looks back
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, (tokens, start) in enumerate(windows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, start - 1 : len(tokens) - 1] = ids[row, start : len(tokens)]
    ids, mask, labels = (x.to(model.device) for x in (ids, mask, labels))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (N, T, V)
    logprob = torch.zeros(labels.shape, dtype=torch.float64)
    for rows in (labels != IGNORE).nonzero().split(max(1, LOGITS_PER_SLICE // logits.shape[-1])):
        at = rows.unbind(-1)
        picked = token_stats(logits[at], labels[at]).logprob
        assert picked is not None
        logprob[tuple(x.cpu() for x in at)] = picked.cpu().double()
    return logprob.sum(-1)
