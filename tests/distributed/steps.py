"""A program for one process or several: some steps of each kind, after which the first writes weights and metrics."""

import json
import sys
from pathlib import Path

import torch

from hybrid import HybridConfig, Learner

ROWS = [{"prompt": f"Tell me about day {i}.", "target": " ".join(["It was good."] * (1 + i % 4))} for i in range(12)]
PAIRS = [{**row, "chosen": row["target"], "rejected": f"Bad {i}, " * (i % 3 + 1)} for i, row in enumerate(ROWS)]


def reward(responses):
    """A share of vowels, which no two processes may see differently."""
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in responses]


def learner(model: str, step: str, /, **sections) -> Learner:
    values = {
        "model": {"name": model},
        "sampling": {"max_new_tokens": 9},
        "sft": {"batch_size": 5},
        "ppo": {"batch_size": 7, "minibatch_size": 5, "microbatch_size": 2, "epochs": 2},
        # Adam divides by a root that may be as small as rounding: what the gradients are shows in plain descent.
        "optimizer": {"name": "sgd", "lr": 0.01},
        "kl": {"coef": 0.2, "adaptive": True, "horizon": 100},
        "score": {"whiten": True},
    }
    if step == "grpo":
        values["ppo"] |= {"advantage": "group", "samples_per_prompt": 3, "batch_size": 3}
    config = HybridConfig.from_dict({**values, **sections})
    data = {"preference_data": PAIRS} if step in ("dpo", "kto") else {}
    return Learner(train_data=ROWS, reward=reward, config=config, **data)


def metrics_of(made: Learner, step: str) -> dict[str, float]:
    if step == "sft":
        return made.sft_step(next(made.loader))
    if step == "one":
        return made.sft_step(ROWS[:1])
    if step in ("dpo", "kto"):
        return made.preference_step(PAIRS[:5], step)
    rollout = made.rollout(next(made.prompts))
    return made.ppo_step(rollout) if step != "joint" else made.joint_step(rollout, made.loader, sft_coef=0.5)


def main(model: str, folder: str, steps: str, sections: str) -> None:
    for step in steps.split(","):
        made = learner(model, step, **json.loads(sections))
        found = [metrics_of(made, kind) for kind in (("ppo", "sft") if step == "then" else (step, step))]
        with made.world.gathered():
            weights = {name: x.detach().cpu().clone() for name, x in made.policy.named_parameters()}
        state = made.world.optimizer_state(made.optimizer)
        if made.world.writes:
            torch.save(weights, Path(folder) / f"{step}.pt")
            text = {"world": [made.world.engine, made.world.size], "metrics": found, "states": sorted(state["state"])}
            (Path(folder) / f"{step}.json").write_text(json.dumps(text))


if __name__ == "__main__":
    main(*sys.argv[1:])
