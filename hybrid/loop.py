"""The loop of a run: which step comes next, what is logged, evaluated and saved on the way."""

import copy
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid.ahead import Ahead
from hybrid.core import Encoded, InputError, Rollout, RunStopped
from hybrid.evaluate import sample_rows
from hybrid.export import export_run
from hybrid.learner import Learner
from hybrid.mixing import Plan, Strategy
from hybrid.objectives import Term, beside, log_names, objective_class, texts_of, varied_rows
from hybrid.resume import MODEL, checkpoint_state, write_checkpoint
from hybrid.rewards import RewardError
from hybrid.run import (
    CHECKPOINTS,
    CONFIG,
    FINISHED,
    SAMPLES,
    Checkpoints,
    RunLog,
    clear_parts,
    disk_errors,
    make_trackers,
    stop_requested,
    write_file,
    write_report,
)

__all__ = ["Progress", "run"]

NUM_SAMPLES = 4  # responses of each rollout that samples.jsonl keeps
NUM_SKIPPED = 8  # rows of a step's first skipped update that it keeps

Metrics = dict[str, float]


@dataclass
class Progress:
    """Where one call of `train` stands; a checkpoint keeps it, so that a resumed run takes the same steps.

    first: the learner's step count when the call began.   metrics: of the last step.
    evaluated, evaluation: when the last evaluation was made, and what it found.
    best, best_step: the watched metric where it last made progress.   num_idle: evaluations since.
    logged: the bytes of the log's files at the checkpoint.
    num_diverged: rollouts in a row, up to the last, whose KL was beyond `kl.limit`.
    ahead: rollouts that were drawn and are not learnt from yet (`Ahead.state`).
    """

    first: int
    metrics: Metrics = field(default_factory=dict)
    evaluated: int | None = None
    evaluation: Metrics = field(default_factory=dict)
    best: float | None = None
    best_step: int | None = None
    num_idle: int = 0
    logged: dict[str, int] | None = None
    num_diverged: int = 0
    ahead: list[dict[str, Any]] = field(default_factory=list)


class Outcome(NamedTuple):
    """The last evaluation of a run, and the signal that ended it before its end."""

    evaluation: Metrics
    stopped_by: Signals | None


def run(learner: Learner, strategy: Strategy, progress: Progress | None = None) -> Outcome:
    """Every step of the strategy, from where `progress` stands.

    SIGINT and SIGTERM finish the step, save a checkpoint where the run has a folder, and end the run; the outcome
    says which.
    Raises RunStopped where it cannot go on: updates that are not finite, a KL beyond its limit, no memory. That and
    a reward's failure name the last good checkpoint.
    """
    strategy = copy.deepcopy(strategy)  # a run's memory is its own
    _check(learner, strategy)
    folder = learner.folder
    if progress is None:
        progress = Progress(first=learner.num_steps)
        learner.updater.begin(learner.num_updates(strategy))
    total = None if strategy.num_steps is None else progress.first + strategy.num_steps
    kept, world = progress.logged if learner.num_steps else {}, learner.world
    written = folder if world.writes else None
    log = RunLog(written, total_steps=total, live=world.writes, new=not learner.begun, kept=kept)
    with log, world.watched():
        learner.begun = True
        if folder is not None:
            world.main(lambda: _prepare(learner, folder, log))
        loop = _Loop(learner, strategy, progress, log)
        learner.updater.on_skip = loop.show_skipped
        try:
            outcome = loop.run()
        except BaseException as error:
            if isinstance(error, (RewardError, RunStopped)):
                error.add_note(loop.last_good())
            # What it has learnt by then is not lost; what stopped it is told also where this fails as well. Other
            # processes may be gone, or somewhere else: without them there is the last checkpoint.
            try:
                if world.size == 1:
                    _finish(learner)
            except InputError as another:
                error.add_note(str(another))
            raise
        finally:
            learner.updater.on_skip = None
            loop.ahead.close()
        _finish(learner)
        if folder is not None and outcome.stopped_by is None:
            world.main(lambda: _write_end(folder, learner.num_steps))
        return outcome


def _write_end(folder: Path, step: int) -> None:
    with disk_errors(f"write to {str(folder / FINISHED)!r}"):
        write_file(folder / FINISHED, json.dumps({"step": step}).encode())


def _prepare(learner: Learner, folder: Path, log: RunLog) -> None:
    """The folder's config and its trackers. The log holds the folder: no other process writes there now."""
    clear_parts(folder)
    (folder / FINISHED).unlink(missing_ok=True)
    with disk_errors(f"write to {str(folder / CONFIG)!r}"):
        learner.config.save(folder / CONFIG)
    names, config = learner.config.run.trackers, learner.config.written()
    log.trackers = make_trackers(names, folder=folder, run_name=folder.name, config=config)


def _finish(learner: Learner) -> None:
    if (folder := learner.folder) is not None and learner.num_steps:
        export_run(learner)
        learner.world.main(learner.keep_memory)
        learner.world.main(lambda: write_report(folder))


def _check(learner: Learner, strategy: Strategy) -> None:
    """Refuse what the strategy cannot run with."""
    config = learner.config
    config.check_training(strategy)
    if config.rollout.staleness and type(strategy).repeated is not Strategy.repeated:
        raise InputError(
            f"rollout.staleness does not go with strategy {type(strategy).__name__}, which gives the responses to one "
            "prompt different beginnings: set it to 0"
        )
    held_out, watched = learner.corpus.held_out_preferences, config.eval.objective
    if config.eval.patience is not None and not (held_out if watched else learner.corpus.eval):
        raise InputError("eval.patience needs held-out data: give eval_data, data.eval or data.eval_fraction")
    if watched and not held_out:
        raise InputError(
            f"eval.metric {config.eval.metric!r} needs held-out data of its objective: give data.eval_fraction, or "
            "where the preferences have a section of their own preference_data.eval_fraction"
        )
    targets = strategy.needs_targets or any(objective_class(name).needs_targets for name in strategy.objectives)
    for name in {*strategy.objectives, *(["sft"] if targets else [])}:
        learner.objectives[name].check()
    if strategy.rolls_out:
        context = learner.policy.backbone.context_length
        added = 0 if learner.memory is None else learner.memory.most_added
        for e in learner.prompts.examples:
            config.sampling.check_room(strategy.prompt_length(e) + added, context, prompt=e.prompt)
        for e in learner.corpus.eval[: config.eval.num_prompts]:
            config.sampling.check_room(len(e.prompt_ids) + added, context, prompt=e.prompt)


class _Loop:
    def __init__(self, learner: Learner, strategy: Strategy, progress: Progress, log: RunLog):
        self.learner, self.strategy, self.progress, self.log = learner, strategy, progress, log
        self.began = time.perf_counter()
        self.ahead = Ahead(learner, progress.ahead)
        self.shown: int | None = None  # the last step whose skipped update was shown
        config = learner.config.checkpoint
        self.every = config.every
        self.checkpoints = None
        if learner.folder is not None:
            self.checkpoints = Checkpoints(
                learner.folder / CHECKPOINTS,
                keep_last=config.keep_last,
                best=learner.config.eval.best,
                keep_best=config.keep_best,
            )
            # Where no step is left, no save does it.
            learner.world.main(self.checkpoints.clear)

    def run(self) -> Outcome:
        learner, progress = self.learner, self.progress
        if progress.evaluated is None:
            self._evaluate()
        # Without a folder there is nothing to save: a signal then means what it always does.
        with stop_requested() if self.checkpoints is not None else nullcontext() as stop:
            while (plan := self._plan()) is not None:
                self._step(plan)
                if learner.config.eval.every and learner.num_steps % learner.config.eval.every == 0:
                    self._evaluate()
                signal = learner.world.first(None if stop is None else stop.signal)
                if signal or self._is_due():
                    self._save()
                exports = learner.config.checkpoint.export_every
                if learner.folder is not None and exports and learner.num_steps % exports == 0:
                    export_run(learner)
                if signal:
                    self.log.say(
                        f"stopped by {signal.name} after step {learner.num_steps}; "
                        f"go on with: hybrid train --resume {learner.folder}"
                    )
                    return Outcome(progress.evaluation, signal)
        if progress.evaluated != learner.num_steps:
            self._evaluate()
            if progress.best_step == learner.num_steps and self._is_due():
                self._save()
        return Outcome(progress.evaluation, None)

    def _plan(self) -> Plan | None:
        """The next step; None where the strategy or the patience is at its end."""
        progress, config = self.progress, self.learner.config.eval
        if config.patience is None or progress.num_idle < config.patience:
            return self.strategy.plan(self.learner.num_steps - progress.first, progress.metrics)
        best = None if self.checkpoints is None else self.checkpoints.best()
        self.log.say(
            f"stopped early after step {self.learner.num_steps}: {config.metric} made no progress in "
            f"{progress.num_idle} evaluations"
            + ("" if progress.best is None else f" after {progress.best:.4g} at step {progress.best_step}")
            + ("" if best is None else f"; the best checkpoint: {best}")
        )
        return None

    def _is_due(self) -> bool:
        """Whether the step that was made is to be kept: it is the turn of it, or the best so far.

        Not while something is wrong: what is kept by then is what the run can go back to.
        """
        step = self.learner.num_steps
        if self.checkpoints is None or not self.every:
            return False
        if self.learner.updater.skipped_in_a_row or self.progress.num_diverged:
            return False
        return step % self.every == 0 or step == self.progress.best_step

    def _step(self, plan: Plan) -> None:
        learner, began = self.learner, time.perf_counter()
        number = learner.num_steps - self.progress.first
        learner.num_steps += 1
        metrics = self._rollout_step(plan, number) if plan.rolls_out else learner.take(plan)
        now = time.perf_counter()
        clock = {"seconds": now - began, "elapsed": now - self.began}
        called, alone = log_names(plan.coefs), len(plan.coefs) == 1
        # What learns from scores says these and the KL instead.
        kinds = {name: objective_class(name) for name in plan.coefs}
        judged = {name for name, kind in kinds.items() if kind.rolls_out and kind.needs_reward}
        beside = {called[name]: coef for name, coef in plan.coefs.items() if name not in judged}
        if not alone:
            metrics |= {f"{name}_coef": coef for name, coef in beside.items()}
        head = {"step": learner.num_steps, "phase": plan.kind, "cycle": plan.cycle, **clock}
        losses = {f"{name}_loss": "loss" if alone else f"{name}_loss" for name in beside}
        remembered = {} if learner.memory is None else learner.memory.metrics()
        self.log.step({**head, **metrics, **self.strategy.metrics(), **remembered}, losses)
        self.progress.metrics = metrics
        if "kl" in metrics:
            self._watch_kl(metrics["kl"])

    def _watch_kl(self, kl: float) -> None:
        progress, config = self.progress, self.learner.config.kl
        # NaN is beyond any limit.
        beyond = config.limit is not None and not kl <= config.limit
        progress.num_diverged = progress.num_diverged + 1 if beyond else 0
        if progress.num_diverged >= config.patience:
            raise RunStopped(
                f"the policy has diverged: the KL to its references, {kl:.4g} nats per response, was beyond kl.limit = "
                f"{config.limit} for {config.patience} rollouts in a row. Lower optimizer.lr or ppo.epochs, or raise "
                "kl.coef"
            )

    def show_skipped(self, terms: Sequence[Term[Any]], metrics: Mapping[str, float]) -> None:
        """Say that an update was skipped, and keep some of its rows; once a step."""
        step = self.learner.num_steps
        if step == self.shown:
            return
        self.shown = step
        rows = [row for term in terms for row in texts_of(term.rows[:NUM_SKIPPED], self.learner.tokenizer)]
        self._log_samples("skipped", rows[:NUM_SKIPPED])
        where = "" if self.learner.folder is None else f"; its rows are in {SAMPLES}, phase skipped"
        self.log.say(
            f"step {step}: skipped an update with loss {metrics['loss']:.4g} and gradient norm "
            f"{metrics['grad_norm']:.4g}{where}"
        )

    def last_good(self) -> str:
        """Where a run that had to stop can go on from."""
        newest = None if self.checkpoints is None else self.checkpoints.newest()
        if newest is None:
            return "There is no checkpoint to go back to."
        return (
            f"The last good checkpoint is {newest}: hybrid train --resume {self.learner.folder} goes on from it, and "
            f"model.name={newest / MODEL} starts a new run with its weights."
        )

    def _answered(self, plan: Plan, number: int) -> tuple[Rollout, Sequence[Encoded]]:
        """The next prompts with their responses."""
        learner, strategy = self.learner, self.strategy
        examples, answered = self.ahead.next(lambda: strategy.prompts(learner.next_prompts(), number))
        # Named only where they say something: a subclass's `rollout` may take prompts alone.
        options: dict[str, Any] = {} if plan.needs_reward else {"scored": False}
        if answered is not None:
            return learner.rollout(examples, answered=answered, **options), examples
        each = strategy.repeated(examples, learner.config.ppo.samples_per_prompt, number)
        if each is not None:
            return learner.rollout(each, repeated=True, **options), examples
        return learner.rollout(examples, **options), examples

    def _varied(self, plan: Plan, number: int) -> tuple[Rollout, Sequence[Encoded], Tensor, Metrics]:
        """Prompts and responses until enough prompts have responses that score unlike, or `ppo.resample` is used up.

        Returns all that was drawn, the rows that are learnt from, and what there is to log of that.
        """
        config, again = self.learner.config.ppo, 0
        rollout, examples = self._answered(plan, number)
        while True:
            rows, found = varied_rows(rollout, config.batch_size)
            if found == config.batch_size or again == config.resample:
                return rollout, examples, rows, {"resampled": float(again), "varied_prompts": float(found)}
            more, others = self._answered(plan, number)
            rollout = beside(rollout, more, num_groups=len(examples))
            examples, again = [*examples, *others], again + 1

    def _rollout_step(self, plan: Plan, number: int) -> Metrics:
        learner, strategy, varied = self.learner, self.strategy, None
        drawn: Metrics = {}
        if learner.config.ppo.resample and plan.needs_reward:
            rollout, examples, varied, drawn = self._varied(plan, number)
        else:
            rollout, examples = self._answered(plan, number)
        batches = {"sft": strategy.supervised(learner, examples)} if "sft" in plan.coefs else None
        rows = strategy.trained_rows(rollout, examples)
        if varied is not None:
            rows = varied if rows is None else rows[torch.isin(rows, varied.cpu())]
        metrics, samples = learner.take(plan, rollout, batches, rows=rows), sample_rows(rollout)[:NUM_SAMPLES]
        metrics |= drawn
        if not plan.needs_reward:
            # The zeros of responses that nobody has judged are no measure.
            names = {"reward", "reward_std", "seconds_reward"}
            metrics = {name: x for name, x in metrics.items() if name not in names and "reward/" not in name}
            samples = [{**row, "reward": None, "components": {}} for row in samples]
        self._log_samples(plan.kind, samples)
        return {**metrics, **self.ahead.metrics}

    def _evaluate(self) -> None:
        metrics, rows = self.learner.evaluation()
        if metrics:
            self.log.step({"step": self.learner.num_steps, "phase": "eval", **metrics})
            self._watch(metrics)
            self.learner.updater.evaluated(metrics, self.learner.config.eval.metric)
            if (reward := self.learner.reward) is not None:
                self.learner.world.main(reward.evaluated)
            # Pairs of answers are rows of another kind.
            self._log_samples("eval", [row for row in rows if "objective" not in row])
            self._log_samples("pairs", [row for row in rows if "objective" in row])
        self.progress.evaluated, self.progress.evaluation = self.learner.num_steps, metrics

    def _watch(self, metrics: Metrics) -> None:
        progress, config = self.progress, self.learner.config.eval
        value = config.watched(metrics)
        if value is None:
            return
        progress.num_idle += 1
        if config.improves(value, progress.best):
            progress.best, progress.best_step, progress.num_idle = value, self.learner.num_steps, 0

    def _save(self) -> None:
        checkpoints, progress, step = self.checkpoints, self.progress, self.learner.num_steps
        assert checkpoints is not None
        progress.ahead, progress.logged = self.ahead.state(), self.log.sizes()
        state = {"strategy": self.strategy.spec(), "memory": self.strategy.state_dict(), **asdict(progress)}
        # An evaluation of an earlier step says nothing of this one.
        metrics = progress.evaluation if progress.evaluated == step else {}
        with checkpoint_state(self.learner, progress=state) as whole:

            def save() -> None:
                self.learner.keep_memory()
                checkpoints.save(step, lambda folder: write_checkpoint(self.learner, folder, state=whole), metrics)

            self.learner.world.main(save)

    def _log_samples(self, phase: str, rows: Iterable[Mapping[str, Any]]) -> None:
        step = self.learner.num_steps
        self.log.samples({"step": step, "phase": phase, "index": i, **row} for i, row in enumerate(rows))
