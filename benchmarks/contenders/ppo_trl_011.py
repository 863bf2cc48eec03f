"""One PPO iteration of TRL 0.11.4: `generate`, rewards, `PPOTrainer.step`; see protocol.py.

Its options are fields of `PPOConfig`.
"""

import torch
from protocol import KL_COEF, LEARNING_RATE, Line, PPOJob, PPOMeter, endless_tokenizer, rewards
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def main() -> None:
    line = Line(PPOJob, "trl", "accelerate")
    job = line.job
    trainer = made(job)
    meter = PPOMeter(trainer.model.pretrained_model, trainer.optimizer.optimizer, job)
    queries = [torch.tensor(ids) for ids in job.prompts]
    for _ in line.iterations(meter):
        responses = trainer.generate(
            queries, batch_size=len(queries), return_prompt=False,
            do_sample=True, top_k=0, max_new_tokens=job.response_length,
        )  # fmt: skip
        meter.generated(sum(map(len, responses)))
        scores = rewards(trainer.tokenizer.batch_decode(responses))
        trainer.step(queries, responses, [torch.tensor(score) for score in scores])


def made(job: PPOJob) -> PPOTrainer:
    settings = {
        "batch_size": len(job.prompts),
        "mini_batch_size": job.minibatch_size,
        "ppo_epochs": job.epochs,
        "learning_rate": LEARNING_RATE,
        "adap_kl_ctrl": False,
        "init_kl_coef": KL_COEF,
        "max_grad_norm": 1.0,
        "seed": job.seed,
        "accelerator_kwargs": {"cpu": job.device == "cpu"},
    }
    model = AutoModelForCausalLMWithValueHead.from_pretrained(job.model, torch_dtype=torch.float32)
    return PPOTrainer(PPOConfig(**(settings | job.fields)), model, tokenizer=endless_tokenizer(job.model))


if __name__ == "__main__":
    main()
