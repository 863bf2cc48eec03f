"""The arms of `mixing.py`, and one run of one arm on one task, to the end of its budget."""

import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from io import StringIO
from statistics import fmean
from typing import Any

import torch

from benchmarks.mixing_tasks import SEED, Task, Work
from hybrid import HybridConfig, HybridTrainer
from hybrid.core import Rollout
from hybrid.mixing import Plan, Strategy, make_strategy
from hybrid.models import Reference

__all__ = ["ARMS", "ENOUGH", "Evaluation", "Lengths", "Metered", "arm_config", "base_of", "run", "until"]

Evaluation = tuple[dict[str, float], list[dict[str, Any]]]
ENOUGH = 10_000  # steps: the budget ends a run, not their number


@dataclass(frozen=True)
class Lengths:
    """Steps of each kind that the whole budget pays for, by what one costs on the base model.

    joint_batch: supervised examples that cost as much as a PPO minibatch and its share of the rollout.
    """

    sft: float
    ppo: float
    joint_batch: int

    @property
    def per_cycle(self) -> int:
        """Supervised steps that cost as much as one PPO step."""
        return max(1, round(self.sft / self.ppo))


def _joint(n: Lengths, token_weight: str = "one", strategy: str = "joint", **fields: Any) -> dict[str, Any]:
    return {
        "mixing": {"strategy": strategy, "steps": ENOUGH, **fields},
        "sft": {"batch_size": n.joint_batch, "token_weight": token_weight},
    }


def _group(objective: str = "ppo", **ppo: Any) -> dict[str, Any]:
    """One objective throughout, on groups of four responses: the same number of responses as elsewhere."""
    return {
        "mixing": {"strategy": "objective", "objective": objective, "steps": ENOUGH},
        "ppo": {"batch_size": 16, "samples_per_prompt": 4, "advantage": "group", **ppo},
    }


# An arm that has both kinds of learning spends half of its tokens on each; of gate and hint the data decide.
ARMS: dict[str, Callable[[Lengths], dict[str, Any]]] = {
    "sft_only": lambda n: {"mixing": {"strategy": "sequential", "sft_steps": ENOUGH, "ppo_steps": 0}},
    "rl_only": lambda n: {"mixing": {"strategy": "sequential", "sft_steps": 0, "ppo_steps": ENOUGH}},
    "rl_only_kl": lambda n: ARMS["rl_only"](n),
    "sequential": lambda n: {
        "mixing": {"strategy": "sequential", "sft_steps": round(n.sft / 2), "ppo_steps": ENOUGH}
    },
    "sequential_kl": lambda n: ARMS["sequential"](n),
    "alternate": lambda n: {
        "mixing": {"strategy": "alternate", "cycles": round(n.ppo), "sft_steps_per_cycle": n.per_cycle}
    },
    "curriculum": lambda n: {
        "mixing": {
            "strategy": "alternate", "cycles": round(n.ppo / 2), "curriculum": "linear",
            "sft_steps_per_cycle": 2 * n.per_cycle, "ppo_steps_per_cycle": 0,
            "final_sft_steps_per_cycle": 0, "final_ppo_steps_per_cycle": 2,
        }
    },
    "joint": lambda n: _joint(n, mu=0.5),
    "joint_p": lambda n: _joint(n, "p", mu=0.5),
    "joint_p(1-p)": lambda n: _joint(n, "p(1-p)", mu=0.5),
    # A short warm-up, then imitation gives way to exploration over two thirds of the run.
    "joint_chord": lambda n: _joint(
        n, mu=0.9, schedule="chord", final_mu=0.05, warmup_steps=round(n.ppo / 40), decay_steps=round(n.ppo / 3)
    ),
    "ptx": lambda n: _joint(n, strategy="ptx", gamma=1.0),
    # Four responses to each prompt, to judge it by their mean: the same number of responses as elsewhere.
    "gate": lambda n: {
        "mixing": {"strategy": "gate", "ppo_steps": ENOUGH, "judge_by": "mean", "buffer": 32},
        "ppo": {"batch_size": 16, "samples_per_prompt": 4},
    },
    "hint": lambda n: {
        "mixing": {"strategy": "hint", "steps": ENOUGH, "hint_steps": round(2 * n.ppo / 3), "sft_coef": 1.0}
    },
    # Of groups: the baselines that learn from rewards alone, and those that learn from demonstrations in the same loss.
    "grpo": lambda n: _group(),
    # Its ratios are of whole responses, and stay closer to 1: the clip is its authors'.
    "gspo": lambda n: _group(ratio="sequence", aggregation="sequence_mean", clip=3e-4, clip_high=4e-4),
    "dapo": lambda n: _group(clip_high=0.28, resample=3),
    "luffy": lambda n: _group("luffy"),
    "srft": lambda n: _group("srft", epochs=1),
    "hpt": lambda n: _group("hpt"),
    "prefix_rft": lambda n: {
        **_group("prefix_rft"),
        "mixing": {"strategy": "prefix_rft", "steps": ENOUGH, "decay_steps": round(2 * n.ppo / 3)},
    },
}  # fmt: skip

# Baselines that PPO's penalty holds close to the policy as it was when PPO began: of sequential, to the SFT model.
# The other arms have no penalty: where SFT goes on, a reference that stands still punishes what it teaches.
HELD = ("rl_only_kl", "sequential_kl")


def arm_config(
    task: Task, work: Work, arm: str, lengths: Lengths, *, seed: int, lr: float | None = None
) -> HybridConfig:
    """The config of a run, which is measured on the test data.

    lr: of a run of the sweep, in both phases, instead of the task's; it is measured on the validation data.
    """
    if lr is not None:
        task = replace(task, sft_lr=lr, ppo_lr=lr)
    sections = {**ARMS[arm](lengths), "kl": {"coef": task.kl_coef if arm in HELD else 0.0}}
    return _config(task, work, sections, seed, "test" if lr is None else "validation")


def _config(task: Task, work: Work, arm: Mapping[str, Any], seed: int, part: str) -> HybridConfig:
    sections = {name: {**task.settings.get(name, {}), **arm.get(name, {})} for name in {*task.settings, *arm}}
    data = sections["data"]
    if sections["mixing"]["strategy"] == "ptx":
        # What the base model was made of, where there is such data: PPO-ptx keeps a model's own language.
        sections["ptx_data"] = {**data, "train": work.files.get("pretrain", work.files["train"])}
    sections["data"] = {**data, "train": work.files["train"], "eval": work.files[part]}
    sections["eval"] = {"num_prompts": 1000, "num_examples": 1000, "batch_size": 128}
    sections["optimizer"] = {"name": "adamw", "lr": task.ppo_lr}
    sections["sft"]["lr_factor"] = task.sft_lr / task.ppo_lr
    return HybridConfig.from_dict(sections, {"model.name": str(work.base), "run.seed": seed})


class Metered(HybridTrainer):
    """A trainer that counts tokens, whatever strategy it follows.

    trained: tokens, prompt included and padding not, that went through a forward pass with a gradient, once for each
        pass; `trained_ppo` of them in PPO minibatches.   generated: tokens that were sampled for training.
    Rollouts are held to the policy that drew the first of them; evaluations find the KL to the base model.
    evaluation_seconds: on the wall's clock and the processor's, which are not the training's.
    """

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.trained = self.trained_ppo = self.generated = 0
        self.last_evaluation: Evaluation = ({}, [])
        self.evaluation_seconds = (0.0, 0.0)
        self.base = self.references
        self.start: list[Reference] | None = None
        self.policy.backbone.register_forward_pre_hook(self._count)
        # The PPO loss calls the whole policy, for its values; the supervised loss the backbone alone.
        self.policy.register_forward_pre_hook(self._count_ppo)

    @property
    def spent(self) -> int:
        """Tokens of the budget."""
        return self.trained + self.generated

    def rollout(self, prompts: Any, **options: Any) -> Rollout:
        if self.start is None:
            self.start = [Reference.from_policy(self.policy)]
        self.references = self.start
        rollout = super().rollout(prompts, **options)
        self.generated += rollout.num_tokens
        return rollout

    def evaluation(self) -> Evaluation:
        wall, cpu = time.perf_counter(), time.process_time()
        self.references = self.base
        self.last_evaluation = super().evaluation()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.evaluation_seconds = (self.evaluation_seconds[0] + wall, self.evaluation_seconds[1] + cpu)
        return self.last_evaluation

    def _count(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self.trained += _num_tokens(inputs)

    def _count_ppo(self, module: Any, inputs: tuple[Any, ...]) -> None:
        self.trained_ppo += _num_tokens(inputs)


def _num_tokens(inputs: tuple[Any, ...]) -> int:
    """Of a forward pass with (input_ids, attention_mask, ...); 0 where it only scores."""
    return int(inputs[1].bool().sum()) if torch.is_grad_enabled() else 0


def until(strategy: Strategy, spent: Callable[[], int], budget: int) -> Strategy:
    """The strategy, ended by the first step that begins with the budget spent."""

    # Asked for once: some strategies look through their plans for it, and there are none left in the end.
    names = strategy.objectives

    class Budgeted(type(strategy)):  # type: ignore[misc]
        @property
        def objectives(self) -> set[str]:
            return names

        def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
            return super().plan(step, metrics) if spent() < budget else None

    return Budgeted(**{field.name: getattr(strategy, field.name) for field in fields(strategy)})  # type: ignore[arg-type]


def base_of(task: Task, work: Work) -> dict[str, Any]:
    """The base model: its `metrics` on the test data, and the `lengths` (see `Lengths`) of runs that start from it."""
    trainer = Metered(config=_config(task, work, {"mixing": {"strategy": "alternate"}}, SEED, "test"))
    metrics = measured(task, trainer.evaluation())
    # PPO first: its responses are then as long as the base model's.
    trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
    ppo_cost, num_sft = trainer.spent, 8
    for _ in range(num_sft):
        trainer.sft_step(next(trainer.loader))
    sft_cost = (trainer.spent - ppo_cost) / num_sft
    ppo, sft = trainer.config.ppo, trainer.config.sft
    joint_batch = round(ppo_cost / ppo.num_updates / sft_cost * sft.batch_size)
    return {"metrics": metrics, "lengths": asdict(Lengths(task.budget / sft_cost, task.budget / ppo_cost, joint_batch))}


def run(task: Task, config: HybridConfig) -> dict[str, Any]:
    """Train to the end of the budget; what the evaluation behind it finds, and what it all took."""
    trainer = Metered(config=config)
    trainer.strategy = until(make_strategy(config.mixing), lambda: trainer.spent, task.budget)
    wall, cpu = time.perf_counter(), time.process_time()
    with redirect_stdout(StringIO()):
        trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "metrics": measured(task, trainer.last_evaluation),
        "tokens": {
            "sft": trainer.trained - trainer.trained_ppo,
            "ppo": trainer.trained_ppo,
            "generated": trainer.generated,
        },
        "steps": trainer.num_steps,
        "wall_seconds": wall - trainer.evaluation_seconds[0],
        "cpu_seconds": cpu - trainer.evaluation_seconds[1],
    }


def measured(task: Task, evaluation: Evaluation) -> dict[str, float]:
    """An evaluation's metrics, and the mean reward of the hard prompts."""
    metrics, rows = evaluation
    if task.is_hard is None:
        return metrics
    return metrics | {"reward_hard": fmean(row["reward"] for row in rows if task.is_hard(row["prompt"]))}
