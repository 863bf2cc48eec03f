"""Asking sequence classifiers: their logits of many texts at once, and their labels by name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hybrid.core import InputError
from hybrid.rewards.fit import count_cut, fitted
from hybrid.rewards.models import pretrained

__all__ = [
    "Classifier",
    "fitted_to",
    "label_index",
    "load_classifier",
    "logits",
    "max_tokens",
    "nli_probabilities",
    "nli_rows",
    "probability",
]

# Tokens of one text where a model allows more: past it, a text of 100,000 characters takes minutes on a CPU.
LONGEST = 4096
# A text is cut at this many before the tokenizer sees it. English has 4 to 5; 100,000 take a tokenizer 0.1 s.
CHARACTERS_PER_TOKEN = 64

NLI = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier in eval mode. labels: the name of each output, from the model's `config.id2label`."""

    tokenizer: Any
    model: Any
    labels: list[str]


def load_classifier(name: str, device: torch.device) -> Classifier:
    """The sequence classifier `name`, a hub name or a folder; to be called through `shared`."""
    tokenizer, model = pretrained("AutoModelForSequenceClassification", name, device)
    return Classifier(tokenizer, model, [model.config.id2label[i] for i in range(model.config.num_labels)])


def logits(
    classifier: Classifier,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
    special_tokens: bool = True,
) -> Tensor:
    """What the model answers to each text or pair of texts: (N, outputs) float32 on the CPU, in the texts' order.

    Texts are cut to what the model can read, a pair at its longer side, and counted. Those of similar length share a
    batch. A model without a pad token is asked in batches all the same, and says what it says to a text alone.
    special_tokens: False for texts that hold the model's own already, as a chat template writes them.
    """
    rows = _encoded(classifier, texts, special_tokens)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    answers = torch.zeros(len(rows), classifier.model.config.num_labels)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        answers[chosen] = _answers(classifier.model, [rows[i] for i in chosen])
    return answers


def fitted_to(
    classifier: Classifier,
    samples: Sequence[tuple[str, str]],
    put: Callable[[str, str], str | tuple[str, str]],
    *,
    special_tokens: bool = True,
) -> list[tuple[str, str]]:
    """Each (prompt, response) as the model can read it whole, by `fitted`: the response is kept.

    put: how the two become the text, or the pair of texts, that the model reads.
    """
    tokenizer = classifier.tokenizer
    longest = max_tokens(tokenizer, classifier.model)
    limit = longest * CHARACTERS_PER_TOKEN

    def num_tokens(prompt: str, response: str) -> int:
        given = put(prompt, response)
        texts = (given,) if isinstance(given, str) else given
        return len(tokenizer(*texts, add_special_tokens=special_tokens, verbose=False)["input_ids"])

    def starts(text: str) -> Sequence[int]:
        if not tokenizer.is_fast:  # it does not tell
            return range(len(text))
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [start for start, _ in found["offset_mapping"]]

    return [
        fitted(prompt[-limit:], response[:limit], num_tokens=num_tokens, starts=starts, longest=longest)
        for prompt, response in samples
    ]


def label_index(labels: Sequence[str], wanted: str, path_word: str) -> int:
    """Where the label `wanted` stands; upper and lower case, "-", "_" and " " are alike.

    path_word: the parameter that names the label, for the InputError where there is no such label.
    """
    names = [_plain(label) for label in labels]
    if _plain(wanted) in names:
        return names.index(_plain(wanted))
    near = get_close_matches(_plain(wanted), names, n=1, cutoff=0.6)
    hint = f"; did you mean {labels[names.index(near[0])]!r}?" if near else ""
    raise InputError(f"{path_word} must be a label of the model ({', '.join(labels)}), got {wanted!r}{hint}")


def probability(classifier: Classifier, texts: Sequence[str], index: int) -> Tensor:
    """The probability of the label that stands at `index`: (N,) float32.

    softmax over all labels; of a model of one label, or of several that may hold together, its sigmoid.
    """
    answers = logits(classifier, texts)
    config = classifier.model.config
    if config.num_labels == 1 or config.problem_type == "multi_label_classification":
        return answers[:, index].sigmoid()
    return answers.softmax(-1)[:, index]


def nli_rows(labels: Sequence[str], names: Sequence[str] | None = None) -> tuple[int | None, ...]:
    """Where a model of natural language inference has entailment, neutral and contradiction; None: it has not.

    labels: the model's.   names: better ones, in the order of the model's outputs, where its own say nothing.
    Raises InputError where no label is entailment.
    """
    if names is not None and len(names) != len(labels):
        raise InputError(f"labels must name the model's {len(labels)} outputs in their order, got {list(names)}")
    plain = [_plain(name) for name in (names or labels)]
    # A model of two labels says "not_entailment", which is not "entailment".
    starts = {"entailment": "entail", "neutral": "neutral", "contradiction": "contradict"}
    rows = tuple(next((i for i, name in enumerate(plain) if name.startswith(starts[kind])), None) for kind in NLI)
    if rows[0] is None:
        raise InputError(
            f"labels must name the model's {len(labels)} outputs, which are called {', '.join(labels)}: "
            f"give entailment, neutral and contradiction in their order"
        )
    return rows


def nli_probabilities(
    classifier: Classifier,
    pairs: Sequence[tuple[str, str]],
    labels: Sequence[str] | None = None,
    *,
    batch_size: int = 64,
) -> Tensor:
    """Probabilities of entailment, neutral and contradiction for (premise, hypothesis): (N, 3) float32.

    A column is NaN where the model has no such label; ask `nli_rows` first.
    labels: names of the model's outputs in their order, where its config says LABEL_0.
    """
    probabilities = logits(classifier, pairs, batch_size=batch_size).softmax(-1)
    missing = torch.full((len(pairs),), torch.nan)
    rows = nli_rows(classifier.labels, labels)
    return torch.stack([missing if row is None else probabilities[:, row] for row in rows], dim=-1)


def max_tokens(tokenizer: Any, model: Any) -> int:
    """The most tokens of a text, special ones included, that the model can read."""
    limits = [LONGEST, tokenizer.model_max_length]  # 1e30 where the tokenizer's files do not say
    if positions := getattr(model.config.get_text_config(), "max_position_embeddings", None):
        embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        # RoBERTa counts positions from pad_id + 1 on.
        padding = getattr(embeddings, "padding_idx", None)
        limits.append(positions - (0 if padding is None else padding + 1))
    return int(min(limits))


def _encoded(classifier: Classifier, texts: Sequence[Any], special_tokens: bool) -> list[dict[str, list[int]]]:
    """Tokens of each text (`input_ids`, and `token_type_ids` where the model wants them), not padded."""
    if not texts:
        return []
    tokenizer = classifier.tokenizer
    longest = max_tokens(tokenizer, classifier.model)
    sides = list(zip(*texts, strict=True)) if isinstance(texts[0], tuple) else [texts]
    short = [[text[: longest * CHARACTERS_PER_TOKEN] for text in side] for side in sides]
    options = {"add_special_tokens": special_tokens, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(*short, **options)
    too_long = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > longest]
    if too_long:
        count_cut(len(too_long))
        cut = tokenizer(
            *[[side[i] for i in too_long] for side in short], truncation=True, max_length=longest, **options
        )
        for key in encoded:
            for place, i in enumerate(too_long):
                encoded[key][i] = cut[key][place]
    # A tokenizer that adds no special tokens turns "" into no tokens, of which no model says anything.
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, 0)
    blank = next(end for end in ends if end is not None)
    return [
        {key: encoded[key][i] or [blank if key == "input_ids" else 0] for key in encoded} for i in range(len(texts))
    ]


def _answers(model: Any, rows: list[dict[str, list[int]]]) -> Tensor:
    """The logits of rows that share a batch, padded at their ends."""
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None or pad_id < 0:  # -1 in early Llama checkpoints
        # An id that no row holds: the end-of-sequence token might be a text's own last one.
        taken = {token for row in rows for token in row["input_ids"]}
        pad_id = next((i for i in range(model.config.get_text_config().vocab_size) if i not in taken), None)
    if pad_id is None and len(rows) > 1:
        middle = len(rows) // 2
        return torch.cat([_answers(model, rows[:middle]), _answers(model, rows[middle:])])
    columns = {key: [torch.tensor(row[key]) for row in rows] for key in rows[0]}
    columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    inputs = {
        key: pad_sequence(column, batch_first=True, padding_value=(pad_id or 0) if key == "input_ids" else 0)
        for key, column in columns.items()
    }
    with torch.inference_mode(), _padded_by(model, pad_id):
        answers: Tensor = model(**{key: value.to(model.device) for key, value in inputs.items()}).logits
    return answers.float().cpu()


@contextmanager
def _padded_by(model: Any, pad_id: int | None) -> Iterator[None]:
    """Have the model take `pad_id` for padding: one that reads left to right answers at the last other token."""
    config = model.config.get_text_config()
    before, config.pad_token_id = config.pad_token_id, pad_id
    try:
        yield
    finally:
        config.pad_token_id = before


def _plain(label: str) -> str:
    return label.lower().replace("-", "_").replace(" ", "_")
