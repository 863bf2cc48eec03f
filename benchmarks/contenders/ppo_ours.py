"""One PPO iteration of HybridTrainer; see protocol.py. Its options are overrides of `HybridConfig`."""

from collections.abc import Callable
from typing import Any

import torch
from protocol import KL_COEF, LEARNING_RATE, Line, PPOJob, PPOMeter, endless_tokenizer, rewards

from hybrid import HybridConfig, HybridTrainer


def main() -> None:
    line = Line(PPOJob, "triton", "vllm")
    job = line.job
    drawn: list[Callable[[int], None]] = []

    def reward(responses: list[str]) -> list[float]:
        drawn[0](sum(len(text.split()) for text in responses))
        return rewards(responses)

    trainer = HybridTrainer(tokenizer=endless_tokenizer(job.model), reward=reward, config=config(job))
    iteration = ITERATIONS[job.rollout](trainer, job, reward)
    meter = PPOMeter(trainer.policy.backbone.model, trainer.optimizer, job)
    drawn.append(meter.generated)
    for _ in line.iterations(meter):
        iteration()


def config(job: PPOJob) -> HybridConfig:
    sections = {
        "model": {"name": job.model, "device": job.device},
        "data": {"template": "none"},
        "sampling": {"max_new_tokens": job.response_length},
        "kl": {"coef": KL_COEF},
        "ppo": {"batch_size": len(job.prompts), "epochs": job.epochs, "minibatch_size": job.minibatch_size},
        "optimizer": {"name": "adamw", "lr": LEARNING_RATE},
        "run": {"seed": job.seed},
    }
    if job.rollout == "vllm":
        sections["ppo"]["importance"] = "token"
    return HybridConfig.from_dict(sections, job.options)


Reward = Callable[[list[str]], list[float]]
Iteration = Callable[[], Any]


def own(trainer: HybridTrainer, job: PPOJob, reward: Reward) -> Iteration:
    return lambda: trainer.ppo_step(trainer.rollout(job.texts))


def generate(trainer: HybridTrainer, job: PPOJob, reward: Reward) -> Iteration:
    """The responses drawn by transformers' `generate`."""
    prompts = torch.tensor(job.prompts, device=trainer.policy.device)

    def iteration() -> None:
        with trainer.autocast():
            ids = trainer.policy.backbone.model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts),
                do_sample=True, top_k=0, max_new_tokens=job.response_length,
            )  # fmt: skip
        responses = ids[:, prompts.shape[1] :]
        trainer.step(list(prompts), list(responses), reward(trainer.tokenizer.batch_decode(responses)))

    return iteration


def vllm(trainer: HybridTrainer, job: PPOJob, reward: Reward) -> Iteration:
    """The responses drawn by vLLM, which takes the policy's weights at the begin of each iteration."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        job.model, dtype=trainer.config.model.precision, max_model_len=len(job.prompts[0]) + job.response_length,
        enforce_eager=job.device == "cpu", gpu_memory_utilization=0.2,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=job.response_length, temperature=1.0, logprobs=0)
    model, prompts = trainer.policy.backbone.model, [{"prompt_token_ids": ids} for ids in job.prompts]

    def iteration() -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(model.state_dict().items())})
        llm.reset_prefix_cache()
        outputs = [answer.outputs[0] for answer in llm.generate(prompts, sampling, use_tqdm=False)]
        responses = [list(output.token_ids) for output in outputs]
        logprobs = [
            [place[token].logprob for token, place in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs
        ]
        trainer.step(job.prompts, responses, reward(trainer.tokenizer.batch_decode(responses)), logprobs)

    return iteration


ITERATIONS = {"own": own, "generate": generate, "vllm": vllm}

if __name__ == "__main__":
    main()
