"""From the rows of a data set to the prompts and targets of a suite."""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid import DataConfig, Example, HybridConfig, InputError
from hybrid.data import read_examples, split_examples

__all__ = ["Rows", "examples_of", "over_200_characters", "review_halves", "review_queries"]

Rows = list[dict[str, Any]]
SEED = 0  # of the choice of rows, which all seeds of a suite share


def examples_of(config: HybridConfig) -> tuple[list[Example], list[Example]]:
    """(training, test) examples of a suite, of which no more than `eval.num_prompts` are tested.

    A source may also be "owner/name/config:split", a data set of the hub with several configurations.
    """
    data = config.data
    if data.train is None:
        raise InputError("this suite needs data: give --data FILE")
    train = read_examples(_source(data.train), data, seed=SEED)
    if data.eval is None:
        if not data.eval_fraction:
            raise InputError("a suite needs test data: give data.eval=FILE, or data.eval_fraction")
        train, test = split_examples(train, data.eval_fraction, seed=SEED)
    else:
        test = read_examples(_source(data.eval), data, seed=SEED)
    return train, test[: config.eval.num_prompts]


def _source(name: str | list[str]) -> Any:
    if not isinstance(name, str) or name.count("/") != 2 or Path(name).suffix or Path(name).exists():
        return name
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    repository, _, rest = name.rpartition("/")
    configuration, _, split = rest.partition(":")
    try:
        return load_dataset(repository, configuration, split=split or "train")
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"data set {name!r} does not load: {error}") from error


def over_200_characters(row: Mapping[str, Any]) -> bool:
    """TRL's filter of IMDB; of WikiText it leaves the paragraphs."""
    return len(row["text"]) > 200


def review_halves(examples: Sequence[Example], tokenizer: Any, data: DataConfig) -> Rows:
    """RL4LMs' rows: the prompt is the end of the first half of a review's words, the target the other half.

    Negative reviews have no target: they are there to be continued. `start` is the whole first half, which the
    classifier is shown; a prompt has no more than `data.prompt_tokens` tokens.
    Source: IMDB and IMDBForSeq2Seq of rl4lms/data_pools/custom_text_generation_pools.py, which cut at spaces.
    """
    return list(_halves(examples, tokenizer, data))


def _halves(examples: Sequence[Example], tokenizer: Any, data: DataConfig) -> Iterator[dict[str, Any]]:
    for example in examples:
        words = example.target.split(" ")
        start, rest = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
        ends = _token_ends(tokenizer, start)
        if ends:
            prompt = start[ends[-data.prompt_tokens - 1] :] if len(ends) > data.prompt_tokens else start
            room = data.max_length - data.prompt_tokens
            yield {"prompt": prompt, "start": start, "target": _target(example, f" {rest}", tokenizer, room)}


def review_queries(
    examples: Sequence[Example], tokenizer: Any, data: DataConfig, lengths: tuple[int, int] = (2, 8)
) -> Rows:
    """TRL's rows: the prompt is the first n tokens of a review, the target what follows.

    n is drawn for each review from range(*lengths), as by trl.core.LengthSampler. Negative reviews have no target.
    """
    draw, rows = random.Random(SEED), []
    for example in examples:
        text, length = example.target, draw.randrange(*lengths)
        ends = _token_ends(tokenizer, text)
        if ends:
            cut = ends[min(length, len(ends)) - 1]
            target = _target(example, text[cut:], tokenizer, data.max_length - length)
            rows.append({"prompt": text[:cut], "target": target})
    return rows


def _target(example: Example, text: str, tokenizer: Any, room: int) -> str:
    """What SFT learns of a review: nothing of a negative one, and no more tokens than there is room for."""
    if str(example.item["label"]) != "1":
        return ""
    ends = _token_ends(tokenizer, text)
    # EOS takes one, and a text that is cut elsewhere may get a token more.
    return text if len(ends) <= room - 4 else text[: ends[room - 5]]


def _token_ends(tokenizer: Any, text: str) -> list[int]:
    """Where each token of the text ends, in characters: a cut there is the same cut among the tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [end for _, end in encoded["offset_mapping"]]
