"""One PPO iteration of TRL 1.12's `experimental.ppo`; see protocol.py.

Its options are fields of `PPOConfig`. Its loop cannot be called for one iteration: `train` runs on, and the batch that
it asks for waits for the request.
"""

import os
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from protocol import KL_COEF, LEARNING_RATE, Line, PPOJob, PPOMeter, endless_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


def main() -> None:
    line = Line(PPOJob, "trl", "accelerate")
    job = line.job
    with tempfile.TemporaryDirectory() as folder:
        trainer = made(job, folder)
        meter = PPOMeter(trainer.policy_model, trainer.optimizer.optimizer, job)
        drawn = ppo_trainer.batch_generation

        def batch_generation(*given: Any) -> tuple[Tensor, Tensor]:
            sequences, logits = drawn(*given)
            meter.generated(sequences[:, len(job.prompts[0]) :].numel())
            return sequences, logits

        ppo_trainer.batch_generation = batch_generation
        trainer.dataloader = Batches(line, meter)
        trainer.train()


class Batches:
    """All prompts, at each request."""

    def __init__(self, line: Line, meter: PPOMeter):
        self.line, self.meter = line, meter

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in self.line.iterations(self.meter):
            yield {"input_ids": torch.tensor(self.line.job.prompts)}
        raise SystemExit  # else `train` would ask for another pass over them


class EvenIds(nn.Module):
    """`rewards` of a response, as the reward model that TRL wants: a backbone, and a score of its last hidden state."""

    base_model_prefix = "backbone"

    def __init__(self, response_length: int):
        super().__init__()
        self.response_length = response_length

    def backbone(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[input_ids])

    def score(self, ids: Tensor) -> Tensor:
        share = (ids[:, -self.response_length :] % 2 == 0).float().mean(1)
        return share[:, None, None].expand(*ids.shape, 1)


def made(job: PPOJob, folder: str) -> PPOTrainer:
    rows = len(job.prompts)
    if job.fields.get("bf16"):
        # It makes an Accelerator that is not told of `bf16`: with transformers 5 all of it would stay in float32.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    settings = {
        "output_dir": folder,
        # It makes a rollout of per_device_train_batch_size * gradient_accumulation_steps rows, and a step of the
        # optimizer only for every gradient_accumulation_steps-th minibatch: without accumulation, one for each.
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "num_mini_batches": rows // job.minibatch_size,
        "num_ppo_epochs": job.epochs,
        "local_rollout_forward_batch_size": rows,
        "total_episodes": 10**9,
        "response_length": job.response_length,
        "temperature": 1.0,
        "learning_rate": LEARNING_RATE,
        "kl_coef": KL_COEF,
        "seed": job.seed,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": job.device == "cpu",
    }
    policy, reference = (AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(job.model, dtype=torch.float32, num_labels=1)
    return PPOTrainer(
        args=PPOConfig(**(settings | job.fields)),
        processing_class=endless_tokenizer(job.model),
        model=policy,
        ref_model=reference,
        value_model=value,
        reward_model=EvenIds(job.response_length),
        train_dataset=Dataset.from_dict({"input_ids": job.prompts}),
    )


if __name__ == "__main__":
    main()
