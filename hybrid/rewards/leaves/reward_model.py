"""A preference model as a reward: any sequence classification checkpoint with a scalar answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import add
from typing import Any, Literal

import torch

from hybrid.core import InputError
from hybrid.rewards.base import register_reward
from hybrid.rewards.classify import Classifier, fitted_to, label_index, load_classifier, logits
from hybrid.rewards.models import ModelReward, existing_model, shared
from hybrid.rewards.samples import Samples

__all__ = ["RewardModel"]


@register_reward("reward_model")
@dataclass
class RewardModel(ModelReward[tuple[Classifier, str, int]]):
    """The raw score of a preference model for prompt and response; any number.

    path: a checkpoint for sequence classification, a folder or of the hub. Of one output the score is that; of
    several it is the logit of `label`. What the model reads is, by `input`,

        chat   the prompt as the user's turn and the response as the assistant's, in the tokenizer's chat template
        pair   the two texts of a pair; of an empty prompt the response alone
        text   prompt + response, one text
        auto   chat where the tokenizer has a template, else pair where it has a separator token, else text

    What is too long for the model loses the prompt's beginning, and is counted as `truncated`.
    """

    reads = ("response", "prompt")

    path: str
    label: str | None = None
    input: Literal["auto", "chat", "pair", "text"] = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        self.model = existing_model(self.path, "path")

    def _load(self, device: torch.device) -> tuple[Classifier, str, int]:
        classifier = shared(load_classifier, self.model, device)
        tokenizer, labels = classifier.tokenizer, classifier.labels
        if self.label is None and len(labels) > 1:
            raise InputError(f"label must say which output of {self.model!r} is the score: {', '.join(labels)}")
        if self.input == "chat" and not tokenizer.chat_template:
            raise InputError(f"input 'chat' needs a tokenizer with a chat template, that of {self.model!r} has none")
        auto = "chat" if tokenizer.chat_template else "pair" if tokenizer.sep_token else "text"
        index = 0 if self.label is None else label_index(labels, self.label, "label")
        return classifier, auto if self.input == "auto" else self.input, index

    def _model_scores(self, loaded: tuple[Classifier, str, int], samples: Samples) -> Sequence[float]:
        classifier, form, index = loaded
        puts: dict[str, Callable[[str, str], str | tuple[str, str]]] = {
            "chat": partial(_chat, classifier.tokenizer),
            "text": add,
            "pair": _pair,
        }
        put = puts[form]
        special_tokens = form != "chat"
        pairs = list(zip(samples.prompts, samples.responses, strict=True))
        texts = [put(*pair) for pair in fitted_to(classifier, pairs, put, special_tokens=special_tokens)]
        scores = torch.zeros(len(texts))
        # Texts and pairs of texts cannot share a batch.
        for kind in (str, tuple):
            rows = [i for i, text in enumerate(texts) if isinstance(text, kind)]
            alike: Any = [texts[i] for i in rows]
            scores[rows] = logits(classifier, alike, special_tokens=special_tokens)[:, index]
        return scores.tolist()


def _pair(prompt: str, response: str) -> str | tuple[str, str]:
    return (prompt, response) if prompt else response


def _chat(tokenizer: Any, prompt: str, response: str) -> str:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    return text
