"""The run's examples as tokens, and how anything else that the user brings becomes one of them."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hybrid.config import HybridConfig
from hybrid.core import Batch, Encoded, Example, InputError
from hybrid.data import (
    DataConfig,
    ExampleSet,
    collate,
    data_line,
    encode,
    encode_all,
    encode_turns,
    examples_from,
    filler_id,
    read_rows,
)

__all__ = ["Corpus", "encoded_corpus"]


@dataclass(frozen=True)
class Corpus:
    """The run's examples, encoded, and how anything else the user brings becomes one."""

    train: list[Encoded]
    eval: list[Encoded]
    ptx: list[Encoded]  # the second data set
    tokenizer: Any
    config: DataConfig
    prompt_template: str  # how a bare prompt is encoded: as the training data's prompts are
    lines: tuple[str, ...] = ()  # for the user, before training: what was taken from which data

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Of each part its number of examples and the hash of their tokens and texts, in order."""
        return {part: _fingerprint(getattr(self, part)) for part in ("train", "eval", "ptx")}

    def check_fingerprint(self, other: Mapping[str, str] | None) -> None:
        """Refuse (InputError) to go on from a state that was saved with other data. None: with data not known."""
        if other is None or not self.train:
            return
        for part, found in self.fingerprint.items():
            if found != other[part]:
                raise InputError(
                    f"the {part} data are not those that the run was saved with ({other[part]}; now {found}): put them "
                    "back as they were, or start a new run from its weights with model.name=CHECKPOINT/model"
                )

    def prompt(self, text: str) -> Encoded:
        """A bare prompt, ready to be answered."""
        if not isinstance(text, str):
            raise InputError(f"a prompt must be a text, got {text!r:.60}")
        example = Example(prompt=text)
        return encode(example, self.tokenizer, replace(self.config, template=self.prompt_template))

    def encoded(self, rows: Batch | Iterable[Any]) -> list[Encoded]:
        """The examples of a batch, or of encoded examples, prompts, or rows as in the training data.

        Rows may also come as a frame or a mapping of columns, as a torch DataLoader over a data set yields them.
        """
        if isinstance(rows, Batch):
            return list(rows.examples)
        if isinstance(rows, str):
            raise InputError(f"expected a list of prompts or rows, got one text: [{rows!r}] is a list of one")
        if not isinstance(rows, Iterable):
            raise InputError(f"expected a list of prompts or rows, got {rows!r:.60}")
        # A frame would give the names of its columns.
        is_table = isinstance(rows, Mapping) or hasattr(rows, "__arrow_c_stream__")
        given: list[Any] = [*(read_rows(rows) if is_table else rows)]
        if all(isinstance(row, Encoded) for row in given):
            return given
        if all(isinstance(row, str) for row in given):
            return [self.prompt(row) for row in given]
        examples = examples_from(given, self.config)
        return [e for example in examples for e in encode_turns(example, self.tokenizer, self.config)]

    def batch(self, rows: Batch | Iterable[Any]) -> Batch:
        """A batch to train on."""
        if isinstance(rows, Batch):
            return rows
        return collate(self.encoded(rows), pad_id=filler_id(self.tokenizer))


def encoded_corpus(
    config: HybridConfig,
    tokenizer: Any,
    train: ExampleSet,
    held_out: ExampleSet,
    ptx: ExampleSet,
    *,
    context: int | None,
) -> Corpus:
    """The examples as tokens. Raises InputError where a prompt leaves no room to answer in the model's context."""
    data = config.data
    sets = (("training", train, data), ("evaluation", held_out, data), ("ptx", ptx, config.ptx_data))
    encoded = [encode_all(each.examples, tokenizer, of, what=what) if each.examples else [] for what, each, of in sets]
    lines = [data_line(len(e), what, each.said) for e, (what, each, _) in zip(encoded, sets, strict=True) if e]
    corpus = Corpus(
        train=encoded[0],
        eval=encoded[1],
        ptx=encoded[2],
        tokenizer=tokenizer,
        config=data,
        prompt_template=_prompt_template([*train.examples, *held_out.examples], data),
        lines=tuple(lines),
    )
    for example in [*corpus.train, *corpus.eval]:
        config.sampling.check_room(len(example.prompt_ids), context, prompt=example.prompt)
    for example in [*corpus.train, *corpus.eval, *corpus.ptx]:
        if context is not None and len(example.input_ids) > context:
            raise InputError(
                f"an example of {len(example.input_ids)} tokens is longer than the model's context of {context}; "
                f"set data.max_length to {context} or less. The example: {example.prompt[:60]!r}"
            )
    return corpus


def _prompt_template(examples: Sequence[Example], config: DataConfig) -> str:
    """Dialogues go through the chat template, and plain text is continued as it is, whatever the config says."""
    if examples and examples[0].messages:
        return "chat"
    return "none" if examples and not examples[0].prompt else config.template


def _fingerprint(examples: Sequence[Encoded]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        for ids in (e.input_ids, e.labels, e.prompt_ids):
            digest.update(array("q", (len(ids), *ids)).tobytes())
        digest.update(json.dumps([e.prompt, e.target]).encode("ascii"))
    return f"{len(examples)} examples, {digest.hexdigest()[:16]}"
