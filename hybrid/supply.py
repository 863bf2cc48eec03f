"""The data's side of a learner: its batches, and a batch of whatever a user calls rows."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hybrid.config import HybridConfig
from hybrid.core import Batch, Encoded, Labelled, Pairs, Rollout
from hybrid.corpus import Corpus
from hybrid.data import AnswerLoader, Loader, PairLoader
from hybrid.loaders import Loaders
from hybrid.memory import Memory, load_memory, make_memory, write_memory
from hybrid.models import Policy

__all__ = ["Supply"]


class Supply:
    """What a `Learner` gives its objectives to learn from, and a person's loop to go over."""

    config: HybridConfig
    corpus: Corpus
    policy: Policy
    folder: Path | None
    num_steps: int

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

    @cached_property
    def memory(self) -> Memory | None:
        """Which prompts come again; None where the config names none."""
        made = make_memory(self.config.memory)
        if made is not None:
            made.attach(self.corpus.train, self.corpus.tokenizer, seed=self.config.run.seed)
            if made.path is not None:
                load_memory(made, made.path)
        return made

    def next_prompts(self) -> Sequence[Encoded]:
        """The examples whose prompts the next rollout answers: the loader's next, or those that the memory picks."""
        drawn = next(self.prompts).examples
        return drawn if self.memory is None else self.memory.pick(drawn, self._clock(self.memory))

    def shown(self, examples: Sequence[Encoded]) -> Sequence[Encoded]:
        """Examples that are answered outside of a rollout, as the policy sees them: the memory may put shots there."""
        return examples if self.memory is None else self.memory.shown(examples)

    def remembered(self, rollout: Rollout) -> Rollout:
        """The rollout, of which the memory has been told."""
        if self.memory is not None:
            self.memory.after_rollout(rollout, self._clock(self.memory))
        return rollout

    def keep_memory(self) -> None:
        """Write the memory into the run's folder, where both are."""
        if self.memory is not None and self.folder is not None:
            write_memory(self.memory, self.folder)

    def _clock(self, memory: Memory) -> int:
        """The step that it is: the run's, or by hand so many rollouts."""
        return max(memory.began + self.num_steps, memory.step + 1)

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
