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
from hybrid.data import DataConfig, collate, encode, encode_all, encode_turns, examples_from, filler_id

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

        Rows may also come as one mapping of columns, as a torch DataLoader over a data set yields them.
        """
        if isinstance(rows, Batch):
            return list(rows.examples)
        if isinstance(rows, str):
            raise InputError(f"expected a list of prompts or rows, got one text: [{rows!r}] is a list of one")
        if isinstance(rows, Mapping):
            if not all(isinstance(column, (list, tuple)) for column in rows.values()):
                raise InputError("expected a list of rows, or a mapping of columns to lists, got one row")
            if len({len(column) for column in rows.values()}) > 1:
                lengths = ", ".join(f"{name} {len(column)}" for name, column in rows.items())
                raise InputError(f"a mapping of columns needs as many values in each, got {lengths}")
            rows = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        if not isinstance(rows, Iterable):
            raise InputError(f"expected a list of prompts or rows, got {rows!r:.60}")
        rows = list(rows)
        if all(isinstance(row, Encoded) for row in rows):
            return rows
        if all(isinstance(row, str) for row in rows):
            return [self.prompt(row) for row in rows]
        examples = examples_from(rows, self.config)
        return [e for example in examples for e in encode_turns(example, self.tokenizer, self.config)]

    def batch(self, rows: Batch | Iterable[Any]) -> Batch:
        """A batch to train on."""
        if isinstance(rows, Batch):
            return rows
        return collate(self.encoded(rows), pad_id=filler_id(self.tokenizer))


def encoded_corpus(
    config: HybridConfig,
    tokenizer: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    ptx: Sequence[Example] = (),
    *,
    context: int | None,
) -> Corpus:
    """The examples as tokens. Raises InputError where a prompt leaves no room to answer in the model's context."""
    data = config.data
    corpus = Corpus(
        train=encode_all(train, tokenizer, data, what="training") if train else [],
        eval=encode_all(held_out, tokenizer, data, what="evaluation") if held_out else [],
        ptx=encode_all(ptx, tokenizer, config.ptx_data, what="ptx") if ptx else [],
        tokenizer=tokenizer,
        config=data,
        prompt_template=_prompt_template([*train, *held_out], data),
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
