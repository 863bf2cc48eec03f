"""The run's examples as tokens, and how anything else that the user brings becomes one of them."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from hybrid.config import HybridConfig
from hybrid.core import Batch, Encoded, Example, InputError, Labelled, Pairs
from hybrid.data import (
    DataConfig,
    ExampleSet,
    answers_of,
    collate,
    collate_answers,
    collate_pairs,
    data_line,
    encode,
    encode_all,
    encode_turns,
    examples_from,
    filler_id,
    read_rows,
)
from hybrid.mixing import make_strategy
from hybrid.models import template_of
from hybrid.objectives import objective_class

__all__ = ["Corpus", "ExampleSets", "encoded_corpus"]


class ExampleSets(NamedTuple):
    """What was read of the run's data: to train on and held out, the second data set, and the preferences' own."""

    train: ExampleSet
    eval: ExampleSet
    ptx: ExampleSet
    preferences: ExampleSet
    preference_eval: ExampleSet


@dataclass(frozen=True)
class Corpus:
    """The run's examples, encoded, and how anything else the user brings becomes one."""

    train: list[Encoded]
    eval: list[Encoded]
    ptx: list[Encoded]  # the second data set
    own_preferences: list[Encoded]  # of preference_data; none: the training examples are asked for theirs
    own_preference_eval: list[Encoded]
    tokenizer: Any
    config: DataConfig
    prompt_template: str  # how a bare prompt is encoded: as the training data's prompts are
    preference_config: DataConfig  # how the preferences were encoded, with the template that they really went through
    lines: tuple[str, ...] = ()  # for the user, before training: what was taken from which data

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Of each part its number of examples and the hash of their tokens and texts, in order."""
        parts = {"train": self.train, "eval": self.eval, "ptx": self.ptx}
        if self.has_own_preferences:
            parts |= {"preference": self.own_preferences, "preference evaluation": self.own_preference_eval}
        return {part: _fingerprint(examples) for part, examples in parts.items()}

    @property
    def has_own_preferences(self) -> bool:
        """Whether the preferences are a data set of their own."""
        return bool(self.own_preferences)

    @property
    def preferences(self) -> list[Encoded]:
        """The examples that objectives of preferences learn from."""
        return self.own_preferences or self.train

    @cached_property
    def pairs(self) -> list[Encoded]:
        """Those of them that are pairs."""
        return [e for e in self.preferences if e.is_pair]

    @property
    def held_out_preferences(self) -> list[Encoded]:
        """The same, held out."""
        return self.own_preference_eval if self.has_own_preferences else self.eval

    def reward_template(self) -> str:
        """The chat template of a reward model of these preferences; see `template_of`."""
        return template_of(self.preference_config, self.tokenizer, self.pairs)

    def check_fingerprint(self, other: Mapping[str, str] | None) -> None:
        """Refuse (InputError) to go on from a state that was saved with other data. None: with data not known."""
        if other is None or not (self.train or self.has_own_preferences):
            return
        for part, found in self.fingerprint.items():
            if found != other.get(part):
                raise InputError(
                    f"the {part} data are not those that the run was saved with ({other.get(part)}; now {found}): put "
                    "them back as they were, or start a new run from its weights with model.name=CHECKPOINT/model"
                )

    def prompt(self, text: str) -> Encoded:
        """A bare prompt, ready to be answered."""
        if not isinstance(text, str):
            raise InputError(f"a prompt must be a text, got {text!r:.60}")
        example = Example(prompt=text)
        return encode(example, self.tokenizer, replace(self.config, template=self.prompt_template))

    def encoded(self, rows: Batch | Iterable[Any], config: DataConfig | None = None) -> list[Encoded]:
        """The examples of a batch, or of encoded examples, examples, prompts, or rows as in the training data.

        config: of the data that the rows are as in; None: the training data's.
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
        config = config or self.config
        read = all(isinstance(row, Example) for row in given)
        examples = given if read else examples_from(given, config)
        return [e for example in examples for e in encode_turns(example, self.tokenizer, config)]

    def batch(self, rows: Batch | Iterable[Any]) -> Batch:
        """A batch to train on."""
        if isinstance(rows, Batch):
            return rows
        return collate(self.encoded(rows), pad_id=filler_id(self.tokenizer))

    def pairs_of(self, rows: Iterable[Any]) -> Pairs:
        """A batch of pairs, made of rows as in the preferences."""
        return collate_pairs(self.encoded(rows, self._rows_config), pad_id=filler_id(self.tokenizer))

    def answers_of(self, rows: Iterable[Any]) -> Labelled:
        """A batch of good and bad answers, made of rows as in the preferences."""
        answers = answers_of(self.encoded(rows, self._rows_config))
        return collate_answers(answers, pad_id=filler_id(self.tokenizer))

    @property
    def _rows_config(self) -> DataConfig:
        """How rows of preferences that are given by hand are read."""
        return self.preference_config if self.has_own_preferences else self.config


def encoded_corpus(config: HybridConfig, tokenizer: Any, sets: ExampleSets, *, context: int | None) -> Corpus:
    """The examples as tokens. Raises InputError where a prompt leaves no room to answer in the model's context."""
    whats = ("training", "evaluation", "ptx", "preference", "preference evaluation")
    configs = (config.data, config.data, config.ptx_data, config.preference_data, config.preference_data)
    encoded: list[list[Encoded]] = []
    lines = []
    for what, each, data in zip(whats, sets, configs, strict=True):
        encoded.append(encode_all(each.examples, tokenizer, data, what=what) if each.examples else [])
        if encoded[-1]:
            lines.append(data_line(len(encoded[-1]), what, each.said))
    train, held_out, ptx, preferences, preference_eval = encoded
    own, every_prompt = sets.preferences.examples, [*sets.train.examples, *sets.eval.examples]
    own_config = replace(config.preference_data, template=_prompt_template(own, config.preference_data))
    # Where there are no other data, a bare prompt is one of the preferences'.
    template = own_config.template if own and not every_prompt else _prompt_template(every_prompt, config.data)
    corpus = Corpus(
        train=train,
        eval=held_out,
        ptx=ptx,
        own_preferences=preferences,
        own_preference_eval=preference_eval,
        tokenizer=tokenizer,
        config=config.data,
        prompt_template=template,
        preference_config=own_config if own else replace(config.data, template=template),
        lines=tuple(lines),
    )
    for example in [*corpus.train, *corpus.eval]:
        config.sampling.check_room(len(example.prompt_ids), context, prompt=example.prompt)
    every = [e for part in encoded for example in part for e in (example, example.rejected) if e is not None]
    for example in every:
        if context is not None and len(example.input_ids) > context:
            raise InputError(
                f"an example of {len(example.input_ids)} tokens is longer than the model's context of {context}; "
                f"set data.max_length to {context} or less. The example: {example.prompt[:60]!r}"
            )
    _check_targets(corpus, config)
    return corpus


def _check_targets(corpus: Corpus, config: HybridConfig) -> None:
    """Refuse prompts without any target where the strategy learns from a rollout's targets."""
    needing = sorted(name for name in make_strategy(config.mixing).objectives if objective_class(name).needs_targets)
    if needing and corpus.train and not any(example.has_target for example in corpus.train):
        raise InputError(
            f"objective {needing[0]!r} learns from demonstrations, the targets of the prompts that are rolled out, and "
            f"none of the {len(corpus.train)} training examples has one: name their column with data.target"
        )


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
        if e.rejected is not None:
            sides = (e.rejected.input_ids, e.rejected.labels)
            digest.update(json.dumps([*sides, e.margin, e.weight]).encode("ascii"))
    return f"{len(examples)} examples, {digest.hexdigest()[:16]}"
