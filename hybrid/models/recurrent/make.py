"""A recurrent language model with random weights, in a folder that `model.name` can name."""

import inspect
from pathlib import Path
from typing import Any

import torch

from hybrid.core import InputError, check_settings, no_progress_bars

__all__ = ["new"]


def new(folder: str | Path, tokenizer: Any, *, cell: str = "lstm", seed: int = 0, **sizes: Any) -> Path:
    """Write a model and the tokenizer to a new folder; returns the folder.

        new("lstm", tokenizer, cell="lstm", hidden_size=256)
        new("slots", tokenizer, hidden_size=128, memory_slots=64, memory_width=16)

    tokenizer: a transformers tokenizer, or a model's name, whose tokenizer it is.
    sizes: what `RecurrentConfig` takes: hidden_size, num_hidden_layers, dropout, memory_slots, memory_width,
        tie_word_embeddings.
    Raises InputError where the folder is there already, and for what is no setting.
    """
    from transformers import AutoTokenizer

    from hybrid.models.recurrent.configuration_recurrent import RecurrentConfig
    from hybrid.models.recurrent.modeling_recurrent import RecurrentForCausalLM

    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{str(folder)!r} is there already; name a new folder")
    if isinstance(tokenizer, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
    inherited = RecurrentConfig().to_dict().keys() - inspect.signature(RecurrentConfig).parameters.keys()
    own = {name: size for name, size in sizes.items() if name not in inherited}
    check_settings(RecurrentConfig, own, what="a recurrent model", path="new_recurrent")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = RecurrentConfig(cell=cell, **{"vocab_size": len(tokenizer), **ids, **sizes})
    except ValueError as error:
        raise InputError(str(error)) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RecurrentForCausalLM(config)
    with no_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
