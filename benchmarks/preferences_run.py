"""The arms of `preferences.py`, one run of one of them, and the reward models that some of them learn from."""

import shutil
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks.kept import kept
from benchmarks.mixing_run import ENOUGH, Evaluation, Metered, until
from benchmarks.preferences_pairs import GOLD, SAMPLING, Prepared, Size
from benchmarks.stamp import commit
from hybrid import HybridConfig, make_reward, make_strategy
from hybrid.objectives.pair_measures import expected_calibration_error

__all__ = [
    "ARMS",
    "MEMBERS",
    "RATES",
    "Watched",
    "arm_config",
    "judge_config",
    "judge_of",
    "judge_spec",
    "judged",
    "measured_pairs",
    "rate_of",
    "run",
    "train_judge",
]

# Reward models of a seed, of each kind; all arms but the ensemble learn from the first, or are measured by it.
MEMBERS = {"reward_model": 1, "reward_model_few": 3}
Sections = dict[str, Any]


def _objective(name: str, **sections: Any) -> Sections:
    return {"mixing": {"strategy": "objective", "objective": name, "steps": ENOUGH}, **sections}


def _blend(coefs: dict[str, float], **sections: Any) -> Sections:
    return {"mixing": {"strategy": "blend", "coefs": coefs, "steps": ENOUGH}, "sft": {"batch_size": 8}, **sections}


PPO = {"batch_size": 64, "minibatch_size": 16, "epochs": 2}
FREE = {"ppo": PPO, "kl": {"coef": 0.0}}  # nothing but the budget holds the policy near the base model
ARMS: dict[str, Sections] = {
    "sft_chosen": _objective("sft", sft={"batch_size": 32}),
    "dpo": _objective("dpo"),
    "kto": _objective("kto", preferences={"batch_size": 32}),
    # The updates of these two are as large as dpo's and sft_chosen's: 16 pairs, and the best answers to 32 prompts.
    "online_dpo": _objective(
        "online_dpo", ppo={"batch_size": 32, "samples_per_prompt": 4, "minibatch_size": 64, "epochs": 1}
    ),
    "raft": _objective("raft", ppo={"batch_size": 32, "samples_per_prompt": 4, "minibatch_size": 128, "epochs": 2}),
    "ppo": _objective("ppo", ppo=PPO),
    # By judges that have seen a tenth of the pairs, with no penalty for the KL.
    "ppo_free_few": _objective("ppo", **FREE),
    "ppo_free_few_ensemble": _objective("ppo", **FREE),
    "dpo_sft": _blend({"dpo": 1.0, "sft": 0.1}),
    "ppo_sft": _blend({"ppo": 1.0, "sft": 0.1}, ppo=PPO),
}  # fmt: skip
# By `preferences.py --sweep`, see `sweep_table`.
RATES = {
    "reward_model": 1e-4, "sft_chosen": 1e-3, "dpo": 1e-4, "kto": 3e-4, "online_dpo": 1e-4, "raft": 3e-5, "ppo": 1e-4,
}  # fmt: skip


def rate_of(arm: str) -> float:
    """The learning rate: that of the arm without what its name ends in, which is another judge, penalty or summand."""
    while arm not in RATES:
        arm = arm.rpartition("_")[0]
    return RATES[arm]


def arm_config(
    arm: str, prepared: Prepared, judges: Sequence[Path], *, seed: int, lr: float | None = None
) -> HybridConfig:
    """The config of a run.   judges: folders of reward models.   lr: of the sweep, instead of the arm's own."""
    sections = {
        **ARMS[arm],
        "reward": judge_spec(judges if arm.endswith("ensemble") else judges[:1]),
        "eval": {"num_prompts": 256, "num_examples": 256, "batch_size": 128},
    }
    return _config(sections, prepared, prepared.prompts, seed, rate_of(arm) if lr is None else lr)


def judge_config(kind: str, prepared: Prepared, output: Path, *, seed: int, lr: float | None = None) -> HybridConfig:
    """The config of a reward model's training, whose folder of that name is in `output`.   kind: see `judge_of`."""
    if kind == "reward_model_few":
        prepared = replace(prepared, train=prepared.few)
    sections = {
        **_objective("reward_model"),
        "eval": {"num_examples": 10_000, "batch_size": 128},
        "checkpoint": {"every": 0},
        "run": {"output": str(output)},
    }
    return _config(sections, prepared, prepared.held_out, seed, RATES["reward_model"] if lr is None else lr)


def _config(sections: Sections, prepared: Prepared, held_out: str, seed: int, lr: float) -> HybridConfig:
    shared = {
        "model": {"name": str(prepared.base), "device": "cpu"},
        "data": {"template": "none", "train": prepared.train, "eval": held_out},
        "sampling": SAMPLING,
        "optimizer": {"name": "adamw", "lr": lr},
    }
    return HybridConfig.from_dict({**shared, **sections}, {"run.seed": seed})


def judge_of(arm: str) -> str:
    """Which kind of reward model the arm learns from, or is measured by."""
    return "reward_model_few" if "_few" in arm else "reward_model"


def judge_spec(folders: Sequence[Path]) -> dict[str, Any]:
    """The reward of one reward model, or of several together, in standard deviations of held-out scores."""
    names = [str(folder) for folder in folders]
    if len(names) == 1:
        return {"type": "reward_model", "path": names[0], "normalized": True}
    return {"type": "reward_model", "path": names, "aggregate": "mean_minus_std", "normalized": True}


class Watched(Metered):
    """A metered trainer that is measured on its way as well: as soon as so many tokens were trained on.

    curve: what was measured, in order, with the tokens trained and generated by then.
    """

    def __init__(self, config: HybridConfig, judge: Any = None, points: Sequence[float] = ()):
        super().__init__(config=config)
        self.judge, self.points = judge, sorted(points)
        self.curve: list[dict[str, float]] = []

    def take(self, *given: Any, **options: Any) -> dict[str, float]:
        metrics = super().take(*given, **options)
        if self.points and self.trained >= self.points[0]:
            self.points = [point for point in self.points if point > self.trained]
            self.evaluation()
        return metrics

    def evaluation(self) -> Evaluation:
        metrics, rows = super().evaluation()
        if self.judge is not None:
            tokens = {"trained": self.trained, "generated": self.generated}
            self.curve.append({**tokens, **judged(metrics, rows, self.judge)})
        return metrics, rows


def judged(metrics: dict[str, float], rows: Sequence[dict[str, Any]], judge: Any) -> dict[str, float]:
    """What is told of an evaluation; `gold` and `judge` are the mean rewards by VADER and by the reward model."""
    prompts, answers = ([row[name] for row in rows] for name in ("prompt", "response"))
    gold, scores = make_reward(GOLD).score(answers), judge.score(answers, prompts=prompts)
    names = ("kl", "response_length", "distinct_2", "sft_loss", "eos_share")
    return {
        "gold": fmean(gold),
        "gold_sem": stdev(gold) / len(gold) ** 0.5,
        "judge": fmean(scores),
        **{name: metrics[name] for name in names},
    }


def run(size: Size, config: HybridConfig, judge: Path) -> dict[str, Any]:
    """Train to the end of the budget: what was measured on the way, and what it took."""
    points = [share * size.budget for share in size.points]
    trainer = Watched(config, make_reward(judge_spec([judge])), points)
    return {**_trained(trainer, size.budget), "curve": trainer.curve}


def _trained(trainer: Watched, budget: int) -> dict[str, Any]:
    trainer.strategy = until(make_strategy(trainer.config.mixing), lambda: trainer.trained, budget)
    cpu = time.process_time()
    with redirect_stdout(StringIO()):
        trainer.train()
    return {
        "tokens": {"trained": trainer.trained, "generated": trainer.generated},
        "steps": trainer.num_steps,
        "cpu_seconds": time.process_time() - cpu - trainer.evaluation_seconds[1],
    }


def train_judge(config: HybridConfig, budget: int) -> dict[str, Any]:
    """A reward model, kept in the run's folder; how well it tells held-out pairs apart.   budget: tokens."""
    assert config.run.output is not None
    folder = Path(config.run.output)

    def made() -> dict[str, Any]:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        trainer = Watched(config)
        taken = _trained(trainer, budget)
        return {"seed": config.run.seed, "commit": commit(), **taken, "metrics": measured_pairs(trainer)}

    about = {"config": config.written(), "budget": budget}
    # Not with_suffix: a learning rate in the name has a point.
    return {**kept(folder.parent / f"{folder.name}.json", about, made), "folder": str(folder / "reward_model")}


def measured_pairs(trainer: Any) -> dict[str, float]:
    """accuracy, loss and ece on the held-out pairs with the labels they have, and with every label right (`clean_`)."""
    pairs = [e for e in trainer.corpus.eval if e.is_pair]
    found = trainer.objectives["reward_model"].evaluate(pairs, 128)
    margin = [row["chosen_reward"] - row["rejected_reward"] for row in found.rows]
    clean = [-x if e.item["is_flipped"] else x for e, x in zip(pairs, margin, strict=True)]
    return {
        **{name: found.metrics[name] for name in ("accuracy", "loss", "ece", "num_pairs")},
        "clean_accuracy": fmean((x > 0) + 0.5 * (x == 0) for x in clean),
        "clean_ece": expected_calibration_error(torch.tensor(clean, dtype=torch.float64)),
    }
