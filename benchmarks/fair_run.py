"""The arms of `fair.py`, what is tuned of each, and one run of one arm, to the end of both of its budgets."""

import random
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from statistics import fmean
from typing import Any

from benchmarks.fair_tasks import ABILITIES, DATA, QUESTIONS, TASK, answer, training
from benchmarks.mixing_run import ENOUGH, Lengths, Metered, until
from benchmarks.mixing_tasks import Work
from hybrid import HybridConfig, PPOConfig
from hybrid.mixing import make_strategy

__all__ = ["ARMS", "NUM_TRIALS", "POINTS", "Trial", "config_of", "lengths_of", "run", "settings_of", "trials"]

NUM_TRIALS = 4  # configurations that are tried of each arm
POINTS = 3  # of the learning curve, beside its start
SFT_LR, RL_LR = (3e-4, 3e-3), (1e-4, 1e-3)  # ends of the rates, which are drawn evenly between their logarithms
SECTIONS: dict[str, Any] = {
    "reward": {"type": "python", "function": "benchmarks.fair_tasks:solved"},
    "sampling": {"max_new_tokens": 6},
    "sft": {"batch_size": 32},
    # Groups of eight, without a critic: what the strategies of the literature are made for, and the same for all arms.
    "ppo": {"batch_size": 8, "samples_per_prompt": 8, "minibatch_size": 32, "epochs": 1, "advantage": "group_mean"},
    "kl": {"coef": 0.0},
    "eval": {"num_prompts": 1000, "num_examples": 1, "batch_size": 480},
}


@dataclass(frozen=True)
class Trial:
    """One configuration.   coef, schedule: in [0, 1); what they mean is the arm's."""

    sft_lr: float
    rl_lr: float
    coef: float
    schedule: float


def trials(count: int = NUM_TRIALS, seed: int = 0) -> list[Trial]:
    """The configurations, the same for every arm.

    Drawn at random, one in each `count`-th of each dimension (a Latin hypercube): a few cover what there is.
    """
    generator = random.Random(seed)
    columns = []
    for _ in range(4):
        order = generator.sample(range(count), count)
        columns.append([(place + generator.random()) / count for place in order])
    return [Trial(_log(s, SFT_LR), _log(r, RL_LR), c, v) for s, r, c, v in zip(*columns, strict=True)]


def _log(x: float, ends: tuple[float, float]) -> float:
    """From the first end (x = 0) to the second (1), evenly in logarithms."""
    return ends[0] * (ends[1] / ends[0]) ** x


def _even(x: float, low: float, high: float) -> float:
    return low + x * (high - low)


def _both(n: Lengths, **mixing: Any) -> dict[str, Any]:
    """Both losses in every update, each on half of the tokens."""
    return {"mixing": {"strategy": "joint", "steps": ENOUGH, **mixing}, "sft": {"batch_size": n.joint_batch}}


def _objective(name: str, **settings: float) -> dict[str, Any]:
    return {"mixing": {"strategy": "objective", "objective": name, "steps": ENOUGH}, "objectives": {name: settings}}


# To enter another one, add a line: its config sections, of which `t.coef` and `t.schedule` may decide.
ARMS: dict[str, Callable[[Lengths, Trial], dict[str, Any]]] = {
    "sft_only": lambda n, t: {
        "mixing": {"strategy": "objective", "objective": "sft", "steps": ENOUGH},
        "sft": {"batch_size": round(_log(t.coef, (8, 64)))},
    },
    "rl_only": lambda n, t: {**_objective("ppo"), "ppo": {"entropy_coef": _even(t.coef, 0.0, 0.03)}, "objectives": {}},
    "sequential": lambda n, t: {
        "mixing": {
            "strategy": "sequential", "sft_steps": round(_even(t.schedule, 0.1, 0.9) * n.sft), "ppo_steps": ENOUGH,
        },
        "ppo": {"entropy_coef": _even(t.coef, 0.0, 0.03)},
    },
    "joint": lambda n, t: _both(n, mu=_even(t.coef, 0.05, 0.95)),
    "chord": lambda n, t: _both(
        n, schedule="chord", mu=_even(t.coef, 0.5, 1.0), final_mu=0.05,
        decay_steps=round(_even(t.schedule, 0.2, 1.0) * n.ppo / 2),
    ),
    "gate": lambda n, t: {
        "mixing": {
            "strategy": "gate", "ppo_steps": ENOUGH, "buffer": round(_log(t.schedule, (8, 64))),
            "judge_by": "mean", "threshold": _even(t.coef, 0.0, 0.5),
        },
    },
    "luffy": lambda n, t: _objective("luffy", gamma=_log(t.coef, (0.01, 1.0))),
    "srft": lambda n, t: _objective(
        "srft", sft_weight=_log(t.coef, (0.1, 2.0)), rl_weight=_log(t.schedule, (0.03, 1.0))
    ),
    "hpt": lambda n, t: _objective("hpt", sft_coef=_log(t.coef, (0.1, 3.0)), threshold=_even(t.schedule, 0.0, 0.5)),
    "prefix_rft": lambda n, t: {
        "mixing": {
            "strategy": "prefix_rft", "steps": ENOUGH, "share": _even(t.coef, 0.5, 1.0),
            "decay_steps": round(_even(t.schedule, 0.2, 1.0) * n.ppo),
        },
    },
}  # fmt: skip


def settings_of(own: Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    """The config sections of a run of an arm whose own are `own`: all but data, model and seed."""
    merged = {name: {**SECTIONS.get(name, {}), **own.get(name, {})} for name in sorted({*SECTIONS, *own})}
    merged["optimizer"] = {"name": "adamw", "lr": trial.rl_lr}
    merged["sft"]["lr_factor"] = trial.sft_lr / trial.rl_lr
    return merged


def config_of(settings: Mapping[str, Any], work: Work, *, part: str, seed: int) -> HybridConfig:
    """The config of a run, which is measured on `part` of the data."""
    data = {**DATA, "train": work.files["train"], "eval": work.files[part]}
    return HybridConfig.from_dict({**settings, "data": data}, {"model.name": str(work.base), "run.seed": seed})


def lengths_of(name: str, tokens: int) -> Lengths:
    """The steps of each kind that so many tokens pay for, where responses are as long as the answers."""
    rows = training(QUESTIONS[name])
    prompt = fmean(len(row["prompt"]) for row in rows)
    answered = fmean(len(answer(row["prompt"])) for row in rows) + 1  # and the end
    ppo, batch = PPOConfig(**SECTIONS["ppo"]), SECTIONS["sft"]["batch_size"]
    # A response is drawn, then learnt from in every epoch, with its prompt.
    ppo_cost = ppo.num_responses * (answered + ppo.epochs * (prompt + answered))
    joint_batch = round(ppo_cost / ppo.num_updates / (prompt + answered))
    return Lengths(tokens / (batch * (prompt + answered)), tokens / ppo_cost, joint_batch)


class Watched(Metered):
    """A metered trainer that notes what every evaluation finds, by what the prompt asks for."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.curve: list[dict[str, float]] = []
        self.began = time.process_time()

    @property
    def seconds(self) -> float:
        """Of the processor, in this process, since training began, evaluations left out."""
        return time.process_time() - self.began - self.evaluation_seconds[1]

    def evaluation(self) -> Any:
        if self.curve and self.curve[-1]["tokens"] == self.spent:
            return self.last_evaluation
        seconds = self.seconds
        found = super().evaluation()
        rewards: dict[str, list[float]] = {}
        for row in found[1]:
            rewards.setdefault(row["prompt"][0], []).append(row["reward"])
        abilities = {name: fmean(rewards[name]) for name in ABILITIES}
        self.curve.append(
            {
                "tokens": self.spent,
                "seconds": seconds,
                "reward": fmean(rewards[TASK]),
                **abilities,
                "kl": found[0]["kl"],
            }
        )
        return found


def run(config: HybridConfig, *, tokens: int, seconds: float, points: int = POINTS) -> dict[str, Any]:
    """Train until both budgets are spent.

    Returns the curve (at the start, at each of `points` equal parts of the tokens, at the end of each budget) and which
    of its rows is at the end of which budget.
    """
    trainer = Watched(config=config)
    goals = [tokens * (i + 1) / points for i in range(points)]
    at: dict[str, int] = {}

    def spent() -> float:
        """At the start of every step: measures what is due. 1 when both budgets are spent."""
        due = sum(trainer.spent >= goal for goal in goals)
        ended = {"tokens": trainer.spent >= tokens, "seconds": trainer.seconds >= seconds}
        new = [name for name in ended if ended[name] and name not in at]
        if due or new:
            del goals[:due]
            trainer.evaluation()
            at.update(dict.fromkeys(new, len(trainer.curve) - 1))
        return float(all(ended.values()))

    trainer.strategy = until(make_strategy(config.mixing), spent, 1)
    trainer.began = time.process_time()
    with redirect_stdout(StringIO()):
        trainer.train()
    return {"curve": trainer.curve, "at": at, "steps": trainer.num_steps}
