"""The loop of a run: which step comes next, what is logged, evaluated and saved on the way."""

import copy
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybrid.core import InputError, RunStopped
from hybrid.evaluate import sample_rows
from hybrid.export import export_run
from hybrid.mixing import Plan, Strategy
from hybrid.resume import MODEL, write_checkpoint
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
from hybrid.steps import Term, texts_of

__all__ = ["Progress", "run"]

NUM_SAMPLES = 4  # responses of each rollout that samples.jsonl keeps
NUM_SKIPPED = 8  # rows of a step's first skipped update that it keeps

Metrics = dict[str, float]


@dataclass
class Progress:
    """Where one call of `train` stands; a checkpoint keeps it, so that a resumed run takes the same steps.

    first: the trainer's step count when the call began.   metrics: of the last step.
    evaluated, evaluation: when the last evaluation was made, and what it found.
    best, best_step: the watched metric where it last made progress.   num_idle: evaluations since.
    logged: the bytes of the log's files at the checkpoint.
    num_diverged: rollouts in a row, up to the last, whose KL was beyond `kl.limit`.
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


def run(trainer: Any, strategy: Strategy, progress: Progress | None = None) -> Metrics:
    """Every step of the strategy, from where `progress` stands. Returns the last evaluation.

    SIGINT and SIGTERM finish the step, save a checkpoint where the run has a folder, and end the run; the trainer's
    `stopped_by` is that signal then, else None.
    Raises RunStopped where it cannot go on: updates that are not finite, a KL beyond its limit, no memory. That and
    a reward's failure name the last good checkpoint.
    """
    strategy = copy.deepcopy(strategy)  # a run's memory is its own
    _check(trainer, strategy)
    folder = trainer.folder
    if progress is None:
        progress = Progress(first=trainer.num_steps)
        trainer.updater.begin(trainer.num_updates(strategy))
    total = None if strategy.num_steps is None else progress.first + strategy.num_steps
    kept = progress.logged if trainer.num_steps else {}
    with RunLog(folder, total_steps=total, new=not trainer.begun, kept=kept) as log:
        trainer.begun, trainer.stopped_by = True, None
        if folder is not None:
            _prepare(trainer, folder, log)
        loop = _Loop(trainer, strategy, progress, log)
        trainer.updater.on_skip = loop.show_skipped
        try:
            evaluation = loop.run()
        except BaseException as error:
            if isinstance(error, (RewardError, RunStopped)):
                error.add_note(loop.last_good())
            # What it has learnt by then is not lost; what stopped it is told also where this fails as well.
            try:
                _finish(trainer)
            except InputError as another:
                error.add_note(str(another))
            raise
        finally:
            trainer.updater.on_skip = None
        _finish(trainer)
        if folder is not None and trainer.stopped_by is None:
            with disk_errors(f"write to {str(folder / FINISHED)!r}"):
                write_file(folder / FINISHED, json.dumps({"step": trainer.num_steps}).encode())
        return evaluation


def _prepare(trainer: Any, folder: Path, log: RunLog) -> None:
    """The folder's config and its trackers. The log holds the folder: no other process writes there now."""
    clear_parts(folder)
    (folder / FINISHED).unlink(missing_ok=True)
    with disk_errors(f"write to {str(folder / CONFIG)!r}"):
        trainer.config.save(folder / CONFIG)
    names, config = trainer.config.run.trackers, trainer.config.written()
    log.trackers = make_trackers(names, folder=folder, run_name=folder.name, config=config)


def _finish(trainer: Any) -> None:
    if trainer.folder is not None and trainer.num_steps:
        export_run(trainer)
        write_report(trainer.folder)


def _check(trainer: Any, strategy: Strategy) -> None:
    """Refuse what the strategy cannot run with."""
    config = trainer.config
    config.check_training(strategy)
    if config.eval.patience is not None and not trainer.corpus.eval:
        raise InputError("eval.patience needs held-out data: give eval_data, data.eval or data.eval_fraction")
    loader, what = (trainer.ptx_loader, "ptx_data") if strategy.needs_ptx else (trainer.loader, "training")
    learns_targets = strategy.needs_targets or strategy.kinds - {"ppo"}
    if learns_targets and not any(e.has_target for e in loader.examples):
        raise InputError(
            f"this mixture learns from targets, and no {what} example has one; "
            "name their column, or leave the supervised steps out of mixing"
        )
    if strategy.kinds != {"sft"}:
        context = trainer.policy.backbone.context_length
        for e in trainer.prompts.examples:
            config.sampling.check_room(strategy.prompt_length(e), context, prompt=e.prompt)


class _Loop:
    def __init__(self, trainer: Any, strategy: Strategy, progress: Progress, log: RunLog):
        self.trainer, self.strategy, self.progress, self.log = trainer, strategy, progress, log
        self.began = time.perf_counter()
        self.shown: int | None = None  # the last step whose skipped update was shown
        config = trainer.config.checkpoint
        self.every = config.every
        self.checkpoints = None
        if trainer.folder is not None:
            self.checkpoints = Checkpoints(
                trainer.folder / CHECKPOINTS,
                keep_last=config.keep_last,
                best=trainer.config.eval.best,
                keep_best=config.keep_best,
            )
            # Where no step is left, no save does it.
            self.checkpoints.clear()

    def run(self) -> Metrics:
        trainer, progress = self.trainer, self.progress
        if progress.evaluated is None:
            self._evaluate()
        # Without a folder there is nothing to save: a signal then means what it always does.
        with stop_requested() if self.checkpoints is not None else nullcontext() as stop:
            while (plan := self._plan()) is not None:
                self._step(plan)
                if trainer.config.eval.every and trainer.num_steps % trainer.config.eval.every == 0:
                    self._evaluate()
                signal = None if stop is None else stop.signal
                if signal or self._is_due():
                    self._save()
                exports = trainer.config.checkpoint.export_every
                if trainer.folder is not None and exports and trainer.num_steps % exports == 0:
                    export_run(trainer)
                if signal:
                    trainer.stopped_by = signal
                    self.log.say(
                        f"stopped by {signal.name} after step {trainer.num_steps}; "
                        f"go on with: hybrid train --resume {trainer.folder}"
                    )
                    return progress.evaluation
        if progress.evaluated != trainer.num_steps:
            self._evaluate()
            if progress.best_step == trainer.num_steps and self._is_due():
                self._save()
        return progress.evaluation

    def _plan(self) -> Plan | None:
        """The next step; None where the strategy or the patience is at its end."""
        progress, config = self.progress, self.trainer.config.eval
        if config.patience is None or progress.num_idle < config.patience:
            return self.strategy.plan(self.trainer.num_steps - progress.first, progress.metrics)
        best = None if self.checkpoints is None else self.checkpoints.best()
        self.log.say(
            f"stopped early after step {self.trainer.num_steps}: {config.metric} made no progress in "
            f"{progress.num_idle} evaluations"
            + ("" if progress.best is None else f" after {progress.best:.4g} at step {progress.best_step}")
            + ("" if best is None else f"; the best checkpoint: {best}")
        )
        return None

    def _is_due(self) -> bool:
        """Whether the step that was made is to be kept: it is the turn of it, or the best so far.

        Not while something is wrong: what is kept by then is what the run can go back to.
        """
        step = self.trainer.num_steps
        if self.checkpoints is None or not self.every:
            return False
        if self.trainer.updater.skipped_in_a_row or self.progress.num_diverged:
            return False
        return step % self.every == 0 or step == self.progress.best_step

    def _step(self, plan: Plan) -> None:
        trainer, began = self.trainer, time.perf_counter()
        number = trainer.num_steps - self.progress.first
        trainer.num_steps += 1
        if plan.kind == "sft":
            metrics = trainer.sft_step(plan.examples or next(trainer.loader))
        else:
            metrics = self._rollout_step(plan, number)
        now = time.perf_counter()
        clock = {"seconds": now - began, "elapsed": now - self.began}
        head = {"step": trainer.num_steps, "phase": plan.kind, "cycle": plan.cycle, **clock}
        self.log.step({**head, **metrics, **self.strategy.metrics()})
        self.progress.metrics = metrics
        if "kl" in metrics:
            self._watch_kl(metrics["kl"])

    def _watch_kl(self, kl: float) -> None:
        progress, config = self.progress, self.trainer.config.kl
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
        step = self.trainer.num_steps
        if step == self.shown:
            return
        self.shown = step
        rows = [row for term in terms for row in texts_of(term.rows[:NUM_SKIPPED], self.trainer.tokenizer)]
        self._log_samples("skipped", rows[:NUM_SKIPPED])
        where = "" if self.trainer.folder is None else f"; its rows are in {SAMPLES}, phase skipped"
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
            f"The last good checkpoint is {newest}: hybrid train --resume {self.trainer.folder} goes on from it, and "
            f"model.name={newest / MODEL} starts a new run with its weights."
        )

    def _rollout_step(self, plan: Plan, number: int) -> Metrics:
        trainer, strategy = self.trainer, self.strategy
        examples = strategy.prompts(next(trainer.prompts).examples, number)
        rollout = trainer.rollout(examples)
        metrics = trainer.joint_step(
            rollout,
            strategy.supervised(trainer, examples) if plan.sft_coef else None,
            sft_coef=plan.sft_coef,
            ppo_coef=plan.ppo_coef,
            rows=strategy.trained_rows(rollout, examples),
        )
        self._log_samples(plan.kind, sample_rows(rollout)[:NUM_SAMPLES])
        return metrics | ({"sft_coef": plan.sft_coef} if plan.sft_coef else {})

    def _evaluate(self) -> None:
        metrics, rows = self.trainer.evaluation()
        if metrics:
            self.log.step({"step": self.trainer.num_steps, "phase": "eval", **metrics})
            self._watch(metrics)
            self.trainer.updater.evaluated(metrics, self.trainer.config.eval.metric)
            self._log_samples("eval", rows)
        self.progress.evaluated, self.progress.evaluation = self.trainer.num_steps, metrics

    def _watch(self, metrics: Metrics) -> None:
        progress, config = self.progress, self.trainer.config.eval
        value = config.watched(metrics)
        if value is None:
            return
        progress.num_idle += 1
        if config.improves(value, progress.best):
            progress.best, progress.best_step, progress.num_idle = value, self.trainer.num_steps, 0

    def _save(self) -> None:
        assert self.checkpoints is not None
        self.progress.logged = self.log.sizes()
        state = {"strategy": self.strategy.spec(), "memory": self.strategy.state_dict(), **asdict(self.progress)}
        # An evaluation of an earlier step says nothing of this one.
        fresh = self.progress.evaluated == self.trainer.num_steps
        self.checkpoints.save(
            self.trainer.num_steps,
            lambda folder: write_checkpoint(self.trainer, folder, progress=state),
            self.progress.evaluation if fresh else {},
        )

    def _log_samples(self, phase: str, rows: Iterable[Mapping[str, Any]]) -> None:
        step = self.trainer.num_steps
        self.log.samples({"step": step, "phase": phase, "index": i, **row} for i, row in enumerate(rows))
