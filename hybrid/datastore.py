"""A datastore of a model and a text: the hidden state before every token that a supervised step would train."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hybrid.config import HybridConfig
from hybrid.core import IGNORE, Batch, InputError
from hybrid.corpus import encoded_corpus
from hybrid.data import collate, filler_id
from hybrid.memory import Datastore, DatastoreInfo, KeyDtype, check_place, filled_datastore
from hybrid.models import Policy
from hybrid.setup import build_policy, load_tokenizer, model_context, read_examples_of

__all__ = ["CAPACITY", "build_datastore", "keys_and_values"]

# Tokens: of a model of width 576, in float16, 11.5 GB.
CAPACITY = 10_000_000


def build_datastore(
    config: HybridConfig,
    folder: str | Path,
    *,
    dtype: KeyDtype = "float16",
    capacity: int = CAPACITY,
    batch_size: int = 16,
    index: bool = False,
) -> Datastore:
    """Write the datastore of `model.name` and `data.train` to `folder`, a batch of examples at a time.

    dtype: of the keys.   capacity: refuse data with more trained tokens.   index: prepare it for faiss.
    Raises InputError before a model is loaded where that is possible.
    """
    if config.model.name is None or config.data.train is None:
        raise InputError("a datastore is made of a model and a text: give model.name and data.train")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    check_place(Path(folder))
    # Nothing is answered: a prompt may fill the context.
    read = replace(config, data=replace(config.data, eval=None, eval_fraction=0.0))
    read = replace(read, sampling=replace(config.sampling, max_new_tokens=1, min_new_tokens=0))
    context, tokenizer = model_context(config.model.name), load_tokenizer(config.model.name)
    examples = encoded_corpus(read, tokenizer, read_examples_of(read), context=context).train
    count = sum(label != IGNORE for e in examples for label in e.labels[1:])
    if not 0 < count <= capacity:
        raise InputError(
            f"data.train has {count:,} tokens to remember, and a datastore takes 1 to {capacity:,}; "
            + ("lower data.limit, or raise --capacity" if count else "give examples with targets")
        )
    policy = build_policy(config.model.name, config.model)
    backbone = policy.backbone.eval()
    info = DatastoreInfo.of(config.model.name, backbone.trunk, tokenizer, hidden_size=backbone.hidden_size, dtype=dtype)
    with filled_datastore(folder, info, index=index) as add:
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size], pad_id=filler_id(tokenizer))
            add(*keys_and_values(policy, batch.to(policy.device)))
    return Datastore(folder)


@torch.no_grad()
def keys_and_values(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hidden state before each trained token, (n, D), and the token, (n,)."""
    hidden = policy.backbone(batch.input_ids, batch.attention_mask, batch.position_ids)
    labels = batch.labels[:, 1:]
    trained = labels != IGNORE
    return hidden[:, :-1][trained], labels[trained]
