"""A reward model of SmolLM2-135M on 600 pairs of Anthropic's harmless-base test set, beside the answers' lengths."""

import json
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.kept import kept
from benchmarks.mixing_tasks import DATA
from benchmarks.preferences_report import wilson
from benchmarks.stamp import commit
from hybrid import DataConfig, Example, HybridConfig, HybridTrainer, RewardModel
from hybrid.data import read_example_set
from hybrid.demo.smollm2 import get_smollm2
from hybrid.run import read_jsonl

__all__ = ["FILE", "length_rule", "reward_model_on_hh"]

FILE = DATA / "hh_rlhf" / "harmless_test_600.jsonl"
NUM_TRAIN, SEED, BATCH_SIZE = 480, 0, 8
MAX_LENGTH = 256  # tokens of a training pair's longer side; held-out pairs are judged at any length


def reward_model_on_hh(work: Path, model: Path | None = None) -> dict[str, Any]:
    """The accuracy on the pairs that were held out, and that of a rule that sees lengths alone.

    model: a folder; None: SmolLM2, which is unpacked where it is not there yet.
    """
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    random.Random(SEED).shuffle(rows)
    parts = rows[:NUM_TRAIN], rows[NUM_TRAIN:]
    train, held_out = (read_example_set(part, DataConfig()).examples for part in parts)
    config = _config(get_smollm2() if model is None else model, work / "hh")

    def made() -> dict[str, Any]:
        measured = _trained(config, *parts)
        right = _right(RewardModel.from_pretrained(work / "hh" / "reward_model", "cpu"), held_out)
        return {
            "commit": commit(),
            "seed": SEED,
            "accuracy": {"pairs": len(right), **wilson(sum(right), len(right))},
            "length_rule": length_rule(train, held_out),
            **measured,
        }

    return kept(work / "hh.json", {"config": config.written()}, made)


def _config(model: Path, output: Path) -> HybridConfig:
    return HybridConfig.from_dict(
        {
            # An adapter in bfloat16: 9 s a step of one core, against 12 s of all weights, and 35 s of these in float32.
            "model": {"name": str(model), "device": "cpu", "precision": "bfloat16", "lora": {}},
            "data": {"template": "none", "max_length": MAX_LENGTH},
            "mixing": {"strategy": "objective", "objective": "reward_model", "steps": 1},
            "preferences": {"batch_size": BATCH_SIZE},
            "optimizer": {"name": "adamw", "lr": 2e-4},
            "scheduler": {"name": "cosine"},
            "eval": {"batch_size": 8, "num_examples": 600},
            "checkpoint": {"every": 0},
            "run": {"seed": SEED, "output": str(output)},
        }
    )


def _trained(config: HybridConfig, train: Sequence[Any], held_out: Sequence[Any]) -> dict[str, Any]:
    """One pass over the training pairs; what the run measured of the held-out ones that are not too long."""
    assert config.run.output is not None
    shutil.rmtree(config.run.output, ignore_errors=True)  # of a run that was stopped
    wall, cpu = time.perf_counter(), time.process_time()
    trainer = HybridTrainer(config=config, train_data=train, eval_data=held_out)
    with redirect_stdout(StringIO()):
        trainer.train(epochs=1)
    metrics = read_jsonl(Path(config.run.output) / "metrics.jsonl")
    return {
        "train_pairs": len(trainer.corpus.pairs),
        "steps": trainer.num_steps,
        "short": [row for row in metrics if row["phase"] == "eval"],
        "training_loss": [row["loss"] for row in metrics if row["phase"] != "eval"],
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }


def _right(model: RewardModel, pairs: Sequence[Example]) -> list[float]:
    """1 of each pair whose chosen answer has the higher score, else 0; a tie is one half."""
    prompts = [pair.prompt for pair in pairs]
    sides = [pair.target for pair in pairs], [pair.rejected.target for pair in pairs if pair.rejected]
    chosen, rejected = (model.score(texts, prompts=prompts).tolist() for texts in sides)
    return [_half(a - b) for a, b in zip(chosen, rejected, strict=True)]


def length_rule(train: Sequence[Example], held_out: Sequence[Example]) -> dict[str, Any]:
    """Prefer the longer answer, or the shorter one, whichever is right more often in training: held-out accuracy."""
    share = sum(map(_is_longer, train)) / len(train)
    right = [_is_longer(pair) if share >= 0.5 else 1 - _is_longer(pair) for pair in held_out]
    prefers = "longer" if share >= 0.5 else "shorter"
    return {"prefers": prefers, "train_share": max(share, 1 - share), **wilson(sum(right), len(right))}


def _is_longer(pair: Example) -> float:
    """Of the chosen answer, in characters; equally long: one half."""
    assert pair.rejected is not None
    return _half(len(pair.target) - len(pair.rejected.target))


def _half(difference: float) -> float:
    return (1 + (difference > 0) - (difference < 0)) / 2
