"""A mixing strategy of your own: a supervised step whenever the reward falls.  custom_strategy.py MODEL"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hybrid import HybridConfig, HybridTrainer, PPOConfig, register_strategy
from hybrid.mixing import Kind, Plan, Strategy

ROWS = [{"prompt": f"Say {w}.", "target": f"{w}, {w}, {w}!"} for w in ("yes", "no", "hello", "why", "sun", "sea")]


@register_strategy("rescue")
@dataclass(frozen=True)
class Rescue(Strategy):
    """PPO, and one supervised step after every rollout whose reward is below the best so far."""

    steps: int = 6  # of both kinds

    @property
    def num_steps(self) -> int:
        return self.steps

    @property
    def objectives(self) -> set[str]:
        return {"sft", "ppo"}

    def for_epochs(self, epochs: float, sft_steps_per_epoch: int, ppo_steps_per_epoch: int) -> "Rescue":
        return replace(self, steps=round(epochs * (sft_steps_per_epoch + ppo_steps_per_epoch)))

    def num_updates(self, updates: Mapping[Kind, int]) -> int:
        return self.steps * updates["ppo"]  # at most

    def plan(self, step: int, metrics: Mapping[str, float]) -> Plan | None:
        best = self.memory.get("best", float("-inf"))
        fell = metrics.get("reward", best) < best
        self.memory["best"] = max(best, metrics.get("reward", best))  # saved with every checkpoint
        if step >= self.steps:
            return None
        return Plan(step, {"sft": 1.0}) if fell else Plan(step, {"ppo": 1.0})


def main(model: str) -> None:
    config = HybridConfig(mixing={"strategy": "rescue"}, ppo=PPOConfig(batch_size=4, minibatch_size=2))
    trainer = HybridTrainer(model, train_data=ROWS, reward=lambda text: text.count("!"), config=config)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:2])
