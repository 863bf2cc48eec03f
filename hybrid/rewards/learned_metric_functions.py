"""What `leaves/learned_metrics` runs under another Python: nothing of ours is imported, and little else.

Each function gets the model's name as every sample's item; it is loaded once and stays.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

BATCH_SIZE = 16


def comet(responses: list[str], targets: list[str], prompts: list[str], items: list[str]) -> list[float]:
    """COMET's segment scores."""
    rows = zip(responses, targets, prompts)  # noqa: B905 - the other Python may be older than `strict`
    samples = [{"src": p, "mt": r, "ref": t} for r, t, p in rows]
    model = _comet(items[0])
    scores: list[float] = model.predict(samples, batch_size=BATCH_SIZE, gpus=_num_gpus(), progress_bar=False).scores
    return scores


def bleurt(responses: list[str], targets: list[str], items: list[str]) -> list[float]:
    """BLEURT's scores, both texts together cut to what the model takes."""
    import torch

    tokenizer, model = _bleurt(items[0])
    scores: list[float] = []
    for start in range(0, len(responses), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        texts = tokenizer(
            targets[rows], responses[rows], padding="longest", truncation=True, max_length=512, return_tensors="pt"
        )
        with torch.inference_mode():
            scores += model(**texts.to(model.device)).logits.flatten().tolist()
    return scores


@lru_cache(maxsize=1)
def _comet(name: str) -> Any:
    import os

    from comet import download_model, load_from_checkpoint  # type: ignore[import-not-found]

    return load_from_checkpoint(name if os.path.exists(name) else download_model(name)).eval()


@lru_cache(maxsize=1)
def _bleurt(name: str) -> tuple[Any, Any]:
    from bleurt_pytorch import BleurtForSequenceClassification, BleurtTokenizer  # type: ignore[import-not-found]

    model = BleurtForSequenceClassification.from_pretrained(name).eval()
    return BleurtTokenizer.from_pretrained(name), model.to("cuda" if _num_gpus() else "cpu")


def _num_gpus() -> int:
    import torch

    return min(1, torch.cuda.device_count())
