"""A run's batches: of the training examples, of prompts, of the second data set and of preferences."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from hybrid.config import HybridConfig
from hybrid.core import Encoded, InputError
from hybrid.corpus import Corpus
from hybrid.data import AnswerLoader, DataConfig, Loader, PairLoader, answers_of, filler_id

__all__ = ["Loaders"]

SAVED = {
    "loader": "train",
    "prompts": "prompts",
    "ptx_loader": "ptx",
    "pair_loader": "pairs",
    "answer_loader": "answers",
}


class Loaders:
    """Endless batches, each kind made when it is first asked for: InputError where there is no data for it.

    Prints what the run's data are.
    """

    def __init__(self, config: HybridConfig, corpus: Corpus):
        self.config, self.corpus = config, corpus
        self._seed, self._pad_id = config.run.seed, filler_id(corpus.tokenizer)
        for line in corpus.lines:
            print(line, flush=True)

    @cached_property
    def train(self) -> Loader:
        """Of the training examples with a target; without any, of all: they still serve rollouts by hand."""
        return self._supervised(self._examples, self.config.data, self._seed)

    @cached_property
    def prompts(self) -> Loader:
        """Of `ppo.batch_size` training examples, whose prompts are rolled out."""
        return Loader(self._examples, self.config.ppo.batch_size, seed=self._seed + 1, pad_id=self._pad_id)

    @cached_property
    def ptx(self) -> Loader:
        """Of the second data set."""
        if not self.corpus.ptx:
            raise InputError("there is no second data set: give HybridTrainer(ptx_data=...) or the config's ptx_data")
        return self._supervised(self.corpus.ptx, self.config.ptx_data, self._seed + 2)

    @cached_property
    def pairs(self) -> PairLoader:
        """Of the pairs of answers among the preferences."""
        if not self.corpus.pairs:
            raise self._lacking("pairs of a chosen and a rejected answer")
        size = self.config.preferences.batch_size
        return PairLoader(self.corpus.pairs, size, seed=self._seed + 3, pad_id=self._pad_id)

    @cached_property
    def answers(self) -> AnswerLoader:
        """Of the single answers among the preferences, good and bad."""
        answers = answers_of(self.corpus.preferences)
        if len({answer.is_good for answer in answers}) < 2:
            raise self._lacking("good answers and bad ones (pairs, or a label of true and false)")
        size = self.config.preferences.batch_size
        return AnswerLoader(answers, size, seed=self._seed + 4, pad_id=self._pad_id)

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The place of each that was drawn from, by the name that it has in checkpoints."""
        return {key: getattr(self, name).state_dict() for key, name in SAVED.items() if name in vars(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; what it does not name had not begun."""
        for key, name in SAVED.items():
            if key in state or name in vars(self):
                getattr(self, name).load_state_dict(state.get(key, {"position": 0}))

    @property
    def _examples(self) -> list[Encoded]:
        if not self.corpus.train:
            raise InputError("training needs data: give HybridTrainer(train_data=...) or the config's data.train")
        return self.corpus.train

    def _supervised(self, examples: list[Encoded], data: DataConfig, seed: int) -> Loader:
        packing_length = data.max_length if self.config.sft.packing else None
        examples = [e for e in examples if e.has_target] or examples
        return Loader(
            examples, self.config.sft.batch_size, seed=seed, pad_id=self._pad_id, packing_length=packing_length
        )

    def _lacking(self, what: str) -> InputError:
        where = "preference_data.train" if self.corpus.has_own_preferences else "data.train"
        return InputError(
            f"preferences are learnt from {what}, and the {len(self.corpus.preferences)} examples of {where} hold "
            "none; name their columns with data.chosen and data.rejected, or give preference_data.train; see "
            "docs/preferences.md"
        )
