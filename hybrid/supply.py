"""The data's side of a learner: its batches, and a batch of whatever a user calls rows."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from hybrid.config import HybridConfig
from hybrid.core import Batch, Encoded, Labelled, Pairs
from hybrid.corpus import Corpus
from hybrid.data import AnswerLoader, Loader, PairLoader
from hybrid.loaders import Loaders
from hybrid.models import Policy

__all__ = ["Supply"]


class Supply:
    """What a `Learner` gives its objectives to learn from, and a person's loop to go over."""

    config: HybridConfig
    corpus: Corpus
    policy: Policy

    @cached_property
    def loaders(self) -> Loaders:
        """Endless batches of every kind; prints what the data are."""
        return Loaders(self.config, self.corpus)

    @property
    def loader(self) -> Loader:
        """Endless batches of the training examples with a target (without any, of all): for `sft_step`, `rollout`."""
        return self.loaders.train

    @property
    def prompts(self) -> Loader:
        """Endless batches of `ppo.batch_size` examples, whose prompts `train` rolls out."""
        return self.loaders.prompts

    @property
    def ptx_loader(self) -> Loader:
        """Endless batches of the second data set. Raises InputError where there is none."""
        return self.loaders.ptx

    @property
    def pair_loader(self) -> PairLoader:
        """Endless batches of pairs of answers. Raises InputError where there are none."""
        return self.loaders.pairs

    @property
    def answer_loader(self) -> AnswerLoader:
        """Endless batches of good and bad answers. Raises InputError where there are none."""
        return self.loaders.answers

    def batch(self, rows: Batch | Iterable[Any]) -> Batch:
        """A batch on the policy's device: as it is, or made of examples as in `train_data`."""
        return self.corpus.batch(rows).to(self.policy.device)

    def pairs(self, rows: Pairs | Iterable[Any]) -> Pairs:
        """The same, of pairs of answers."""
        return (rows if isinstance(rows, Pairs) else self.corpus.pairs_of(rows)).to(self.policy.device)

    def answers(self, rows: Labelled | Iterable[Any]) -> Labelled:
        """The same, of good and bad answers."""
        return (rows if isinstance(rows, Labelled) else self.corpus.answers_of(rows)).to(self.policy.device)

    def batches_of(self, examples: Sequence[Encoded]) -> list[Batch]:
        """The examples in batches of `sft.batch_size`."""
        size = self.config.sft.batch_size
        return [self.corpus.batch(examples[i : i + size]) for i in range(0, len(examples), size)]
