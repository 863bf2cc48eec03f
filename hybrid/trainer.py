"""HybridTrainer: a learner that knows how to run itself."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import Any

from hybrid.core import InputError
from hybrid.data import Endless
from hybrid.learner import Learner
from hybrid.loop import Progress, run
from hybrid.mixing import Sequential, Strategy, make_strategy, passes
from hybrid.resume import checkpoint_state, load_checkpoint, resumable, write_checkpoint
from hybrid.run import filled_folder

__all__ = ["HybridTrainer"]

Metrics = dict[str, float]


class HybridTrainer(Learner):
    """A `Learner`, which has the steps, and the run of the config: what comes next, logged, evaluated and saved.

        trainer = HybridTrainer("gpt2", train_data="reviews.jsonl", reward=my_function)
        trainer.train()

    or, by hand:

        for batch in trainer.loader:                # endless
            trainer.sft_step(batch)
            rollout = trainer.rollout(batch)
            trainer.ppo_step(rollout)
    """

    stopped_by: Signals | None = None  # what ended the last run before its end
    _left: tuple[Strategy, Progress] | None = None  # of a resumed run

    def train(self, epochs: float | None = None) -> Metrics:
        """Run the configured mixture, for `epochs` passes over the data where given. Returns the last evaluation.

        Of a resumed run this is what it had left, whose length cannot be given.
        """
        if self._left is not None:
            if epochs is not None:
                raise InputError(f"a resumed run takes the steps that it had left: train(), not train({epochs!r})")
            left, self._left = self._left, None
            return self._run(*left)
        if epochs is None:
            return self._run(self.strategy)
        return self._run(self.strategy.for_epochs(passes("epochs", epochs), *self._steps_per_epoch()))

    def run_training(self, supervised_epochs: float = 1, rl_epochs: float = 1) -> Metrics:
        """SFT for some passes over the examples, then PPO for some passes over their prompts."""
        sft = passes("supervised_epochs", supervised_epochs) * len(self.loader)
        ppo = passes("rl_epochs", rl_epochs) * len(self.prompts)
        return self._run(Sequential(math.ceil(sft), math.ceil(ppo)))

    @classmethod
    def resume(cls, folder: str | Path, overrides: Sequence[str] = (), **given: Any) -> "HybridTrainer":
        """The trainer of a run that was stopped or killed, as its newest whole checkpoint has it.

            HybridTrainer.resume("runs/reviews").train()

        takes the steps that the run had left: all, before its first checkpoint. Warns of a broken one, and skips it.
        overrides: `section.key=value` as if edited in the run's config.yaml; see `resumable` for what may change.
        given: what the run was given in code and its config.yaml cannot hold: train_data, reward, reference ...
        Raises InputError where there is no run, where it still goes on, and where no checkpoint of it is whole.
        """
        config, checkpoint = resumable(Path(folder), overrides)
        # The folder holds a run, which a new one would be refused.
        trainer = cls(config=replace(config, run=replace(config.run, output=None, trackers=())), **given)
        trainer.config = replace(trainer.config, run=config.run)
        trainer.folder, trainer.begun = Path(folder), True
        if checkpoint is not None:
            state = load_checkpoint(trainer, checkpoint)["progress"]
            strategy = make_strategy(spec) if (spec := state.pop("strategy")) else copy.deepcopy(trainer.strategy)
            strategy.load_state_dict(state.pop("memory"))
            trainer._left = strategy, Progress(**state)
        return trainer

    def save_checkpoint(self, folder: str | Path) -> None:
        """Write everything that the next step depends on: weights, optimizer, scheduler, counters, random streams."""
        with checkpoint_state(self) as state:

            def save() -> None:
                with filled_folder(folder) as temporary:
                    write_checkpoint(self, temporary, state=state)

            self.world.main(save)

    def load_checkpoint(self, folder: str | Path) -> None:
        """Go on from a checkpoint of a trainer that was made alike; the steps that follow are the same, bit for bit."""
        load_checkpoint(self, Path(folder))

    def _steps_per_epoch(self) -> tuple[int, int]:
        """Of updates without a rollout, and of rollouts, so many as are one pass over the data that they learn from."""
        if self.strategy.objectives & {"sft", "ppo"}:
            return len(self.loader), len(self.prompts)
        own = [self.objectives[name] for name in sorted(self.strategy.objectives)]
        rows = [objective.rows() for objective in own if not objective.rolls_out]
        passes = [len(loader) for loader in rows if isinstance(loader, Endless)]
        return max(passes, default=1), len(self.prompts) if self.strategy.rolls_out else 1

    def _run(self, strategy: Strategy, progress: Progress | None = None) -> Metrics:
        outcome = run(self, strategy, progress)
        self.stopped_by = outcome.stopped_by
        return outcome.evaluation
