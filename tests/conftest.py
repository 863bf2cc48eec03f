"""Fixtures that many tests share: the real data and models beside the checkout, and a tiny tokenizer."""

import os
from pathlib import Path

import pytest

# Threads that share cores with other processes wait for each other, and tiny models have no use for two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"the real data is not here: no folder {SHARED}")
    return SHARED / "data"


@pytest.fixture(scope="session")
def stories(shared) -> str:
    """stories260K, a real Llama of 260,032 parameters that tells stories; it has no pad token."""
    return str(shared / "stories260k" / "hf")


@pytest.fixture(scope="session")
def needs_peft() -> None:
    """A peft that transformers takes: PyPI has served pairs that do not go together."""
    from tiny import tiny_model

    from hybrid.core import InputError
    from hybrid.models import LoraConfig, add_lora

    try:
        add_lora(tiny_model(), LoraConfig(rank=2))
    except InputError as error:
        if "version of PEFT" in str(error):
            pytest.skip(f"these versions do not go together: {error}")
        raise


@pytest.fixture(scope="session")
def tokenizer():
    """A word tokenizer of 97 tokens, as many as the tiny models have; no BOS, and pad is EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "<s>",
        "</s>",
        *[
            "###",
            "Prompt:",
            "Response:",
            "```",
            "the",
            "a",
            "it",
            "is",
            "was",
            "good",
            "bad",
            "fine",
            "dull",
            "sad",
            "happy",
            "yes",
            "no",
        ],
    ]
    words += [f"w{i}" for i in range(97 - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
