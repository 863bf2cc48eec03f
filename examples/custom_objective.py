"""A loss of your own, mixed with PPO: keep the policy unsure of the targets' tokens.  custom_objective.py MODEL"""

import sys

from hybrid import Batch, HybridConfig, HybridTrainer, Objective, PPOConfig, register_objective
from hybrid.functional import masked_sum

ROWS = [{"prompt": f"Say {w}.", "target": f"{w}, {w}, {w}!"} for w in ("yes", "no", "hello", "why", "sun", "sea")]


@register_objective("modest")
class Modest(Objective[Batch]):
    """The squared probability of each target token, which imitation alone would drive to 1."""

    def rows(self):
        return self.parts.loader

    def loss_of(self, whole):
        def loss(part):
            logprob, trained = self.parts.policy.batch_logprob(part)  # (B, T-1) each: packed rows are fine
            return masked_sum(logprob.exp().square(), trained) / whole.num_tokens, {}

        return loss


def main(model: str) -> None:
    mixing = {"strategy": "blend", "coefs": {"ppo": 1.0, "modest": 0.1}, "steps": 4}
    config = HybridConfig(mixing=mixing, ppo=PPOConfig(batch_size=4, minibatch_size=2))
    trainer = HybridTrainer(model, train_data=ROWS, reward=lambda text: text.count("!"), config=config)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:2])
