"""What batching saves a reward with a model: one call for 256 texts against 256 calls, side by side in one run.

    python benchmarks/rewards.py

Each reward is timed in turns, once by batch and once one by one, `ROUNDS` times; the ratio is that of the medians.
Writes benchmarks/results/rewards-<device>.json.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks.stamp import device_name, stamp  # noqa: E402
from hybrid.rewards import Reward, make_reward  # noqa: E402

NUM_TEXTS = 256
ROUNDS = 3
STORIES = ROOT.parent / "shared" / "data" / "stories260k" / "hf"
REVIEWS = ROOT.parent / "shared" / "data" / "rotten_tomatoes" / "rt-polarity.pos"


def main() -> None:
    torch.manual_seed(0)
    texts, targets = _texts()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in _specs(Path(folder), texts).items():
            reward = make_reward(spec)
            reward(texts[0], targets[0])  # loads the model
            rows.append({"reward": name, **_timed(reward, texts, targets)})
            line = "{reward:32} batch {batch_s:7.3f} s   single {single_s:7.3f} s   ratio 1/{ratio:.1f}"
            print(line.format(**rows[-1]))
    result = {
        "benchmark": "rewards",
        **stamp("sentence-transformers"),
        "num_texts": NUM_TEXTS,
        "rounds": ROUNDS,
        "seed": 0,
        "rows": rows,
    }
    file = ROOT / "benchmarks" / "results" / f"rewards-{device_name()}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(file.relative_to(ROOT))


def _texts() -> tuple[list[str], list[str]]:
    """Different review sentences of 10 to 25 words, and others as their targets."""
    lines = [line.strip() for line in REVIEWS.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in dict.fromkeys(lines) if 10 <= len(line.split()) <= 25]
    return lines[:NUM_TEXTS], lines[NUM_TEXTS : 2 * NUM_TEXTS]


def _specs(folder: Path, texts: list[str]) -> dict[str, dict[str, Any]]:
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    # No trained classifier can be had offline: one of random weights takes the same time as one that knows. Its sizes
    # are those of google/bert_uncased_L-2_H-128_A-2, but for the vocabulary, which is that of the texts.
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in texts for word in text.split()})]
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    config = BertConfig(vocab_size=len(words), id2label={0: "negative", 1: "positive"}, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return {
        "cosine_sts, MiniLM": {"type": "cosine_sts"},
        "perplexity, stories260K": {"type": "perplexity", "model": str(STORIES)},
        "sentiment, BERT 2 x 128": {"type": "sentiment", "model": str(folder)},
    }


def _timed(reward: Reward, texts: list[str], targets: list[str]) -> dict[str, Any]:
    batch, single, difference = [], [], 0.0
    for _ in range(ROUNDS):
        together, seconds = _seconds(lambda: list(reward.score(texts, targets)))
        batch.append(seconds)
        alone, seconds = _seconds(lambda: [reward(*pair) for pair in zip(texts, targets, strict=True)])
        single.append(seconds)
        difference = max(abs(a - b) for a, b in zip(together, alone, strict=True))
    return {
        "batch_s": median(batch),
        "single_s": median(single),
        "ratio": median(single) / median(batch),
        "spread": [min(single) / max(batch), max(single) / min(batch)],
        "max_difference": difference,
    }


def _seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
