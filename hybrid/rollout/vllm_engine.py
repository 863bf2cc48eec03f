"""vLLM as an engine: it draws from a copy of the policy's weights, which follows the policy."""

import copy
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid.core import InputError, RunStopped, first_line
from hybrid.functional import autocast_dtype
from hybrid.models import Backbone, Policy, is_adapted, merged
from hybrid.rollout.engine import Engine, RolloutConfig
from hybrid.rollout.responses import Responses
from hybrid.rollout.sampling import SamplingConfig
from hybrid.rollout.steps import Speaker

__all__ = ["VLLMEngine", "check_model"]

# Read when vLLM is imported. In this process, which hands it tensors as they are; on a CPU a GiB of keys and values,
# and no cores of its own choice, which would be the trainer's too.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class VLLMEngine(Engine):
    """Draws with vLLM, in this process. Owns the `vllm.LLM`, made at the first call.

    Before a call it is given the policy's weights, an adapter merged into them, if one of their bits has changed.
    Each response has a seed of its own out of `generator`, and no keys and values are kept from call to call: the same
    calls with the same weights draw the same tokens on the same machine. The streams of chance of the process stay as
    they were.
    A stop text ends a response once it is whole: vLLM draws on, and what stands behind is dropped.
    """

    def __init__(self, policy: Policy, config: RolloutConfig):
        super().__init__(policy, config)
        self._llm: Any = None
        self._given: list[int] | None = None  # of the weights that it was last given: see `_bits`

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        sampling: SamplingConfig,
        *,
        eos_ids: Sequence[int],
        pad_id: int = 0,
        repeats: int = 1,
        generator: torch.Generator | None = None,
        is_over: Callable[[Sequence[int]], bool] | None = None,
        begun: Responses | None = None,
        limit: int | None = None,
        through: Callable[[Backbone], Speaker] | None = None,
    ) -> Responses:
        """Raises RunStopped where vLLM fails, or draws what has no log-prob."""
        if begun is not None or through is not None:
            raise InputError("rollout.engine=vllm only draws whole responses of the model itself: take engine torch")
        num_rows, device = len(prompt_ids) * repeats, prompt_ids.device
        place = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**62, (num_rows,), generator=generator, device=place).tolist()
        how = replace(sampling, max_new_tokens=min(limit or sampling.max_new_tokens, sampling.max_new_tokens))
        prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask.bool(), strict=True)]
        self._follow()
        with self._running("drawing responses"):
            shared = request(how, eos_ids, allowed_ids(self.policy))
            params = [_vllm().SamplingParams(**shared, seed=seed) for seed in seeds]
            asked = [{"prompt_token_ids": ids} for ids in prompts for _ in range(repeats)]
            answers = self._llm.generate(asked, params, use_tqdm=False)
        return responses_of(answers, how, eos_ids=eos_ids, is_over=is_over, pad_id=pad_id, device=device)

    def update(self, state: Mapping[str, Tensor]) -> None:
        with self._running("taking new weights"):
            if self._llm is None:
                self._llm = self._started()
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(state.items())})

    def close(self) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._given = None

    def _follow(self) -> None:
        """Have it hold the policy's weights, and nothing of earlier calls."""
        model = self.policy.backbone.model
        now = _bits(model)
        if now != self._given:
            self.update((merged(model) if is_adapted(model) else model).state_dict())
            self._given = now
        self._llm.reset_prefix_cache()

    def _started(self) -> Any:
        """A `vllm.LLM` of the policy's shape, with weights that mean nothing yet."""
        model = self.policy.backbone.model
        dtype = autocast_dtype(self.policy.device) or self.policy.backbone.head_weight.dtype
        shape = copy.deepcopy(model.config)
        shape.architectures = [type(model).__name__]
        if hasattr(shape, "quantization_config"):  # what it is given is plain
            del shape.quantization_config
        options = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": -1,  # as much of the model's context as its memory holds
            "gpu_memory_utilization": 0.3,  # the rest is the trainer's
            "enforce_eager": self.policy.device.type == "cpu",
            "disable_log_stats": True,
            **self.config.vllm,
        }
        with tempfile.TemporaryDirectory() as folder:
            shape.save_pretrained(folder)
            return _vllm().LLM(
                folder, load_format="dummy", skip_tokenizer_init=True, logprobs_mode="processed_logprobs", **options
            )

    @contextmanager
    def _running(self, doing: str) -> Iterator[None]:
        """Around all that vLLM does: its failure is a RunStopped, and chance is as it was before."""
        cuda = [self.policy.device] if self.policy.device.type == "cuda" else []
        python, numpy = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=cuda):
                yield
        except InputError:
            raise
        except Exception as error:
            raise RunStopped(
                f"rollout.engine=vllm failed while {doing}: {type(error).__name__}: {first_line(error)}. The run can "
                "be resumed from its last checkpoint, with rollout.engine=torch too"
            ) from error
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def check_model(config: Any) -> None:
    """Refuse (InputError) a model, by its transformers config, that vLLM cannot run on this machine."""
    vllm = _vllm()
    names = config.architectures or []
    if names and not set(names) & set(vllm.ModelRegistry.get_supported_archs()):
        raise InputError(
            f"rollout.engine=vllm: vLLM {vllm.__version__} does not know {', '.join(names)}; take rollout.engine=torch"
        )
    if torch.cuda.is_available():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if size not in (known := CPUAttentionBackend.get_supported_head_sizes()):
        raise InputError(
            f"rollout.engine=vllm: on a CPU vLLM {vllm.__version__} attends with heads of {', '.join(map(str, known))} "
            f"numbers, this model's have {size}; take rollout.engine=torch"
        )


def request(sampling: SamplingConfig, eos_ids: Sequence[int], allowed: list[int] | None) -> dict[str, Any]:
    """The arguments of `vllm.SamplingParams` that all responses have in common."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "logprobs": 0,  # of the token that was drawn alone
        "stop_token_ids": sorted(set(eos_ids)),
        "ignore_eos": True,  # the model's own: they are among ours
        "allowed_token_ids": allowed,
        "detokenize": False,
    }


def allowed_ids(policy: Policy) -> list[int] | None:
    """The ids that the tokenizer has, where the model has more (`Backbone.fit_vocabulary`); None: all."""
    bias = policy.backbone.head_bias
    if bias is None or bias.isfinite().all():
        return None
    return bias.isfinite().nonzero().squeeze(1).tolist()


def responses_of(
    answers: Sequence[Any],
    sampling: SamplingConfig,
    *,
    eos_ids: Sequence[int],
    is_over: Callable[[Sequence[int]], bool] | None,
    pad_id: int,
    device: torch.device,
) -> Responses:
    """vLLM's answers, one response each, as tensors; a response ends with the first token behind which it `is_over`.

    Raises RunStopped for an answer without tokens, and for a log-prob that is not finite.
    """
    rows, logprobs, ended = [], [], []
    for answer in answers:
        output = answer.outputs[0]
        ids = list(output.token_ids)
        end = None if is_over is None else next((n for n in range(1, len(ids) + 1) if is_over(ids[:n])), None)
        rows.append(ids[:end])
        logprobs.append([known[token].logprob for known, token in zip(output.logprobs, ids, strict=True)][:end])
        ended.append(end is not None or not set(ids[-1:]).isdisjoint(eos_ids))
        if not ids or not all(map(math.isfinite, logprobs[-1])):
            raise RunStopped(
                "rollout.engine=vllm drew "
                + ("tokens whose log-probs are not finite" if ids else f"nothing ({output.finish_reason})")
                + ": the policy's weights have diverged, or vLLM has not taken them. Lower optimizer.lr, or take "
                "rollout.engine=torch"
            )
    drawn = Responses.of_lists(rows, max(map(len, rows)), pad_id=pad_id, device=device)
    logprob = torch.zeros(drawn.ids.shape)
    # Of the likeliest token there is no distribution: its log-prob is 0, as `draw` has it.
    for number, row in enumerate(logprobs if sampling.temperature else ()):
        logprob[number, : len(row)] = torch.tensor(row)
    return replace(drawn, ended=torch.tensor(ended, device=device), logprob=logprob.to(device))


def _vllm() -> ModuleType:
    """The package, imported with an environment that suits a trainer."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm

    return vllm


@torch.no_grad()
def _bits(model: Any) -> list[int]:
    """A sum over each parameter's bits, which another value changes: 64 bits of it, so by chance never."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [x.detach().contiguous().view(words[x.element_size()]).sum() for x in model.parameters()]
    return torch.stack([x.cpu() for x in sums]).tolist()
