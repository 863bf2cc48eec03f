"""The demo: a small model learns a language by SFT, then hybrid cycles teach it to like things."""

import json
import random
from itertools import chain, count
from pathlib import Path
from typing import Any

from hybrid.config import HybridConfig
from hybrid.core import check_seed
from hybrid.data import read_rows
from hybrid.demo.corpus import reviews
from hybrid.demo.model import demo_model, demo_tokenizer
from hybrid.demo.smollm2 import get_smollm2
from hybrid.models import Policy
from hybrid.run import filled_folder, open_run_folder
from hybrid.trainer import HybridTrainer

__all__ = ["run_demo"]

NUM_REVIEWS, NUM_HELD_OUT_PROMPTS = 3600, 256
# What both stages share: the reviews as they are, without a template around the prompt.
COMMON: dict[str, Any] = {
    "data": {"template": "none"},
    "sampling": {"max_new_tokens": 44},
    "eval": {"num_prompts": NUM_HELD_OUT_PROMPTS, "num_examples": 400, "batch_size": 64, "every": 50},
}
# The language first: plain SFT from random weights.
LANGUAGE: dict[str, Any] = {
    "mixing": {"strategy": "sequential", "sft_steps": 300, "ppo_steps": 0},
    "sft": {"batch_size": 32},
    "optimizer": {"name": "adamw", "lr": 2e-3},
}
# Then the taste: PPO for VADER's word on the response, and SFT steps between its rollouts to keep the language.
TASTE: dict[str, Any] = {
    "reward": {"type": "sentiment_lexicon"},
    "mixing": {"strategy": "alternate", "cycles": 40, "sft_steps_per_cycle": 4, "ppo_steps_per_cycle": 1},
    "sft": {"batch_size": 32},
    "ppo": {"batch_size": 64, "minibatch_size": 16, "epochs": 4, "entropy_coef": 0.02},
    "kl": {"coef": 0.08},
    "optimizer": {"name": "adamw", "lr": 2e-4},
}
# A pretrained model brings its language and needs smaller steps.
PRETRAINED: dict[str, Any] = TASTE | {
    "mixing": {"strategy": "alternate", "cycles": 24, "sft_steps_per_cycle": 1, "ppo_steps_per_cycle": 1},
    "sft": {"batch_size": 16},
    "ppo": {"batch_size": 32, "minibatch_size": 8, "epochs": 2},
    "kl": {"coef": 0.05},
    "optimizer": {"name": "adamw", "lr": 3e-5, "value_head_lr": 1e-4},
    "sampling": {"max_new_tokens": 24},
    "eval": {"num_prompts": 64, "num_examples": 200},
}


def run_demo(*, output: str | None = None, seed: int = 0, model: str | None = None) -> HybridTrainer:
    """Run the demo into `output` (runs/demo, or the next free runs/demo-N, where None); returns its trainer.

    model: None for the built-in one, "smollm2", or a model's folder.
    """
    check_seed("--seed", seed)
    folder = open_run_folder(output or _free_folder("runs/demo"), beside=("data", "base"))
    data = _write_reviews(folder / "data", seed)
    if model is None:
        start, settings = _taught_model(folder, data, seed), COMMON | TASTE
    else:
        start, settings = get_smollm2() if model == "smollm2" else Path(model), COMMON | PRETRAINED
    config = _config(settings, data, seed, model=start, output=folder)
    trainer = HybridTrainer(config=config)
    trainer.train()
    return trainer


def _taught_model(folder: Path, data: dict[str, str], seed: int) -> Path:
    """A small model that was taught the language of the reviews by SFT, saved in the run's folder."""
    tokenizer = demo_tokenizer(row["prompt"] + row["target"] for row in read_rows(data["train"]))
    trainer = HybridTrainer(
        Policy(demo_model(tokenizer, seed=seed)), tokenizer, config=_config(COMMON | LANGUAGE, data, seed)
    )
    trainer.train()
    trainer.save(folder / "base")
    return folder / "base"


def _config(
    settings: dict[str, Any], data: dict[str, str], seed: int, *, model: Path | None = None, output: Path | None = None
) -> HybridConfig:
    overrides = {
        "data.train": data["train"],
        "data.eval": data["eval"],
        "run.seed": seed,
        "run.output": None if output is None else str(output),
        "model.name": None if model is None else str(model),
    }
    return HybridConfig.from_dict(settings, overrides)


def _write_reviews(folder: Path, seed: int) -> dict[str, str]:
    """Training and held-out reviews as JSONL files; no held-out prompt is among the training prompts."""
    rows = reviews(NUM_REVIEWS, seed=seed)
    prompts = sorted({row["prompt"] for row in rows})
    held_out = set(random.Random(seed).sample(prompts, NUM_HELD_OUT_PROMPTS))
    parts = {
        "train": [row for row in rows if row["prompt"] not in held_out],
        "eval": [row for row in rows if row["prompt"] in held_out],
    }
    with filled_folder(folder) as temporary:
        for name, part in parts.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (temporary / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in parts}


def _free_folder(name: str) -> str:
    """The name itself, or the first of name-2, name-3, ... that is not taken."""
    names = chain([name], (f"{name}-{i}" for i in count(2)))
    return next(path for path in names if not Path(path).exists())
