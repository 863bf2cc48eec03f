"""The models and rollouts that `ppo_step.py` measures, and their files: random weights of real shapes, no EOS."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybrid.core import no_progress_bars

__all__ = ["SIZES", "Size", "llama", "write_model"]


@dataclass(frozen=True)
class Size:
    """A model of `family` (transformers' name), and what an iteration is.

    is_large: whether a GPU does not hold more than two contenders.
    """

    family: str
    shape: dict[str, Any]
    vocabulary: int
    num_prompts: int = 16
    prompt_length: int = 32
    response_length: int = 48
    epochs: int = 4
    minibatch_size: int = 4
    is_large: bool = False

    def prompts(self, seed: int) -> list[list[int]]:
        shape = (self.num_prompts, self.prompt_length)
        return torch.randint(self.vocabulary, shape, generator=torch.Generator().manual_seed(seed)).tolist()


def llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **others,
    }


SIZES = {
    "tiny": Size("llama", llama(2, 128, 512, 4, 4), 2048),
    "mid": Size("llama", llama(4, 256, 1024, 4, 4), 50257),
    # One epoch, to bound an iteration.
    "smollm2": Size("llama", llama(30, 576, 1536, 9, 3, tie_word_embeddings=True), 49152, epochs=1),
    # Without dropout, which only TRL 0.11.4 leaves on in PPO.
    "gpt2": Size(
        "gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}, 50257,
        num_prompts=64, prompt_length=64, response_length=128, minibatch_size=16,
    ),
    # The shape of Qwen2.5-1.5B.
    "llama-1.5b": Size(
        "llama", llama(28, 1536, 8960, 12, 2, tie_word_embeddings=True), 151936,
        num_prompts=64, prompt_length=64, response_length=128, epochs=1, minibatch_size=16, is_large=True,
    ),
}  # fmt: skip


def write_model(folder: Path, size: Size, *, seed: int, device: str) -> None:
    """A folder that every contender's transformers reads: float32 weights, and a tokenizer whose words are the ids.

    No token is EOS, so that all responses have full length.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(size.family, vocab_size=size.vocabulary, **special, **size.shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    with no_progress_bars():
        model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # the GPU is the contenders'
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(size.vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
