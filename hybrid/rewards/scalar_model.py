"""Reward models: sequence classifiers of which one output is the score of a prompt and its response."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import add
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hybrid.core import InputError
from hybrid.rewards.classify import Classifier, fitted_to, label_index, load_classifier, logits
from hybrid.rewards.models import existing_model, shared
from hybrid.run import filled_folder

__all__ = ["Form", "RewardModel"]

Form = Literal["auto", "chat", "pair", "text"]
# As transformers' tokenizers call their files.
TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "merges.txt", "*.tiktoken")


class RewardModel:
    """A preference model with its tokenizer and template, in eval mode; asked about texts, never trained here.

    model = RewardModel.from_pretrained("out/reward_model")
    model.score([" A good answer.", " A bad one."], prompts=["A question?"] * 2)     # (2,) float32

    What it reads is, by `form`,

        chat   the prompt as the user's turn and the response as the assistant's, in the tokenizer's chat template
        pair   the two texts of a pair; of an empty prompt the response alone
        text   prompt + response, one text
        auto   chat where the tokenizer has a template, else pair where it has a separator token, else text

    label: which output is the score, where there are several.
    """

    def __init__(self, classifier: Classifier, *, label: str | None = None, form: Form = "auto"):
        self.classifier, self.name = classifier, str(classifier.model.name_or_path)
        tokenizer, labels = classifier.tokenizer, classifier.labels
        if label is None and len(labels) > 1:
            raise InputError(f"label must say which output of {self.name!r} is the score: {', '.join(labels)}")
        if form == "chat" and not tokenizer.chat_template:
            raise InputError(f"input 'chat' needs a tokenizer with a chat template, that of {self.name!r} has none")
        auto: Form = "chat" if tokenizer.chat_template else "pair" if tokenizer.sep_token else "text"
        self.form = auto if form == "auto" else form
        self._index = 0 if label is None else label_index(labels, label, "label")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device | None = None,
        *,
        label: str | None = None,
        form: Form = "auto",
        share: bool = False,
    ) -> "RewardModel":
        """A folder of `save_reward_model`, or any checkpoint for sequence classification, of the hub too.

        device: None is the GPU where there is one.   share: the weights, with all that name this model.
        Raises InputError where there is no such model, or no tokenizer beside it.
        """
        name = existing_model(str(name_or_path), "name_or_path")
        folder = Path(name)
        if folder.is_dir() and not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
            raise InputError(
                f"a reward model whose tokenizer cannot be found: {name!r} holds none; save there, by "
                "tokenizer.save_pretrained, the one that the model was trained with"
            )
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        classifier = shared(load_classifier, name, place) if share else load_classifier(name, place)
        return cls(classifier, label=label, form=form)

    def score(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Tensor:
        """The score of each response, (B,) float32 on the CPU: the raw output, any number.

        texts: B responses.   prompts: as many. None: the texts are whole, read as they stand with the special tokens
        that the tokenizer puts around a text; by the template of `save_reward_model`, as it was trained on plain text.
        What is too long for the model loses the prompt's beginning. Raises ValueError where the lengths differ.
        """
        if isinstance(texts, str) or isinstance(prompts, str):
            raise ValueError("texts and prompts must be lists of texts, got one text")
        if prompts is not None and len(prompts) != len(texts):
            raise ValueError(f"prompts must be as many as texts: got {len(prompts)} for {len(texts)}")
        form, tokenizer = self.form, self.classifier.tokenizer
        if prompts is None and form == "chat" and not _takes_whole(tokenizer):
            form = "text"
        puts: dict[str, Callable[[str, str], str | tuple[str, str]]] = {
            "chat": partial(_chat, tokenizer),
            "text": add,
            "pair": _pair,
        }
        put, special_tokens = puts[form], form != "chat"
        pairs = list(zip([""] * len(texts) if prompts is None else prompts, texts, strict=True))
        given = [put(*pair) for pair in fitted_to(self.classifier, pairs, put, special_tokens=special_tokens)]
        scores = torch.zeros(len(given))
        # Texts and pairs of texts cannot share a batch.
        for kind in (str, tuple):
            rows = [i for i, text in enumerate(given) if isinstance(text, kind)]
            alike: Any = [given[i] for i in rows]
            scores[rows] = logits(self.classifier, alike, special_tokens=special_tokens)[:, self._index]
        return scores

    @property
    def statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of its scores on held-out data, as its config.json has them.

        Raises InputError where it has none.
        """
        config = self.classifier.model.config
        found = [getattr(config, name, None) for name in ("reward_mean", "reward_std")]
        mean, std = (float(x) if isinstance(x, (int, float)) else math.nan for x in found)
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise InputError(
                f"{self.name!r} does not say how its scores are distributed: its config.json has reward_mean "
                f"{found[0]} and reward_std {found[1]}; save it with statistics, or leave `normalized` out"
            )
        return mean, std

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as plain transformers files; complete, or not at all."""
        with filled_folder(folder, stale=("model*.safetensors*",)) as temporary:
            self.classifier.model.save_pretrained(temporary)
            self.classifier.tokenizer.save_pretrained(temporary)


def _pair(prompt: str, response: str) -> str | tuple[str, str]:
    return (prompt, response) if prompt else response


def _chat(tokenizer: Any, prompt: str, response: str) -> str:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    return text


def _takes_whole(tokenizer: Any) -> bool:
    """Whether the chat template writes nothing but special tokens around a response without a prompt."""
    text = _chat(tokenizer, "", "x")
    for special in tokenizer.all_special_tokens:
        text = text.replace(special, "")
    return text == "x"
