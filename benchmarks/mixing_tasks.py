"""The three tasks of `mixing.py`: what is learnt, from which base model, and for how many tokens."""

import json
import random
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from hybrid import HybridConfig, HybridTrainer
from hybrid.data import read_rows
from hybrid.demo import demo_model, demo_tokenizer, reviews
from hybrid.models import Policy
from hybrid.run import filled_folder

__all__ = ["DATA", "SEED", "TASKS", "Pretraining", "Task", "Work", "prepare", "pretrained"]

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SEED = 0  # of the data and the base models, which all runs of a task share
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Pretraining:
    """How a base model is made of the part `pretrain`: SFT of the demo's architecture from random weights."""

    vocab_size: int
    steps: int
    batch_size: int = 32
    lr: float = 2e-3


@dataclass(frozen=True)
class Task:
    """One task. Every arm starts from its base model and learns from the same examples.

    about: for the table.   rows: makes the parts `train`, `validation` (for the learning rates), `test`, and
        `pretrain`, the language of the base model.
    base: how the base model is made, or the folder of one.
    settings: config sections that all arms share.   budget: tokens of a run, see `mixing_run.Metered`.
    kl_coef: of the arms that have a KL penalty.
    sft_goal: what the sweep judges SFT by; the reward, where the demonstrations show what it asks for.
    sft_lr, ppo_lr: by `mixing.py --sweep`; NOTES.md says how.   is_hard: prompts whose reward is also reported alone.
    """

    about: str
    rows: Callable[[], dict[str, Rows]]
    base: Pretraining | Path
    settings: Mapping[str, Any]
    budget: int
    kl_coef: float
    sft_lr: float
    ppo_lr: float
    sft_goal: Literal["sft_loss", "reward"] = "sft_loss"
    is_hard: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Work:
    """What `prepare` made: the base model's folder, and the file of each part of the data."""

    base: Path
    files: dict[str, str]


def prepare(task: Task, folder: Path) -> Work:
    """Write the task's data and base model into `folder`, where they are not there yet."""
    data = folder / "data"
    if not data.is_dir():
        with filled_folder(data) as temporary:
            for name, rows in task.rows().items():
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (temporary / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    files = {path.stem: str(path) for path in sorted(data.glob("*.jsonl"))}
    if isinstance(task.base, Path):
        return Work(task.base, files)
    work = Work(folder / "base", files)
    if not work.base.is_dir():
        pretrained(task.base, task.settings["data"], work.files["pretrain"]).save(work.base)
    return work


def pretrained(base: Pretraining, data: Mapping[str, Any], file: str) -> HybridTrainer:
    """The base model, made of the rows of `file`, which are read as the config section `data` says."""
    texts = (row["prompt"] + row["target"] for row in read_rows(file))
    tokenizer = demo_tokenizer(texts, vocab_size=base.vocab_size)
    config = HybridConfig.from_dict(
        {
            "data": dict(data),
            "mixing": {"strategy": "sequential", "sft_steps": base.steps, "ppo_steps": 0},
            "sft": {"batch_size": base.batch_size},
            "optimizer": {"name": "adamw", "lr": base.lr},
            "run": {"seed": SEED},
        }
    )
    trainer = HybridTrainer(Policy(demo_model(tokenizer, seed=SEED)), tokenizer, file, config=config)
    with redirect_stdout(StringIO()):
        trainer.train()
    return trainer


def _review_rows() -> dict[str, Rows]:
    """The demo's reviews, good, bad and mixed alike. No prompt of one part is in another."""
    parts = _parts_by_prompt(reviews(6000, seed=SEED), {"test": 256, "validation": 256, "pretrain": 600})
    for name in ("test", "validation"):
        parts[name] = list({row["prompt"]: row for row in parts[name]}.values())
    return parts


def _digit_rows() -> dict[str, Rows]:
    """Strings of digits and the same digits sorted.

    The base model has seen many of length 2 to 4; the demonstrations are 600, of length 3 to 8.
    """
    generator = random.Random(SEED)

    def strings(count: int, lengths: range) -> Rows:
        made = ("".join(generator.choices("0123456789", k=generator.choice(lengths))) for _ in range(count))
        return [{"prompt": f"{digits}>", "target": "".join(sorted(digits))} for digits in made]

    parts = _parts_by_prompt(strings(1800, range(3, 9)), {"test": 480, "validation": 480, "train": 600})
    held_out = {row["prompt"] for name in ("test", "validation") for row in parts[name]}
    pretrain = [row for row in strings(4000, range(2, 5)) if row["prompt"] not in held_out]
    return {**parts, "pretrain": pretrain}


def _film_rows() -> dict[str, Rows]:
    """Sentences of real film reviews, up to 160 characters, good and bad alike (Pang and Lee 2005)."""
    files = [DATA / "rotten_tomatoes" / f"rt-polarity.{end}" for end in ("pos", "neg")]
    lines = sorted({line.strip() for file in files for line in file.read_text(encoding="utf-8").splitlines()})
    texts = [line for line in lines if 40 <= len(line) <= 160]
    random.Random(SEED).shuffle(texts)
    rows = [{"text": text} for text in texts]
    return {"test": rows[:256], "validation": rows[256:512], "train": rows[512:4512]}


def _parts_by_prompt(rows: Rows, sizes: Mapping[str, int]) -> dict[str, Rows]:
    """Parts of so many prompts each, with all the rows of their prompts; the other rows are `train`, if not asked."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    random.Random(SEED).shuffle(prompts)
    part_of: dict[str, str] = {}
    for name, size in sizes.items():
        part_of |= dict.fromkeys(prompts[len(part_of) : len(part_of) + size], name)
    parts: dict[str, Rows] = {}
    for row in rows:
        parts.setdefault(part_of.get(row["prompt"], "rest"), []).append(row)
    rest = parts.pop("rest", [])
    return {"train": rest} | parts


PPO = {"batch_size": 64, "minibatch_size": 16, "epochs": 2}
TASKS = {
    "reviews": Task(
        about="reviews of a small grammar; reward: VADER's sentiment of the response",
        rows=_review_rows,
        base=Pretraining(vocab_size=1280, steps=300),
        settings={
            "data": {"template": "none"},
            "reward": {"type": "sentiment_lexicon"},
            "sampling": {"max_new_tokens": 32},
            "sft": {"batch_size": 32},
            "ppo": {**PPO, "entropy_coef": 0.02},
        },
        kl_coef=0.05,
        budget=200_000,
        sft_lr=3e-4,
        ppo_lr=1e-4,
    ),
    "digits": Task(
        about="sort 3 to 8 digits, after a base that knows 2 to 4; reward: 1 for the exact answer",
        rows=_digit_rows,
        # 259: the bytes and three special tokens, so every digit is a token.
        base=Pretraining(vocab_size=259, steps=600),
        settings={
            "data": {"template": "none"},
            "reward": {"type": "exact_match"},
            "sampling": {"max_new_tokens": 10},
            "sft": {"batch_size": 32},
            "ppo": PPO,
        },
        kl_coef=0.01,
        budget=200_000,
        sft_lr=1e-3,
        ppo_lr=1e-4,
        sft_goal="reward",
        is_hard=lambda prompt: len(prompt.rstrip(">")) >= 6,
    ),
    "films": Task(
        about="stories260K learns real film reviews; reward: VADER's sentiment of the response",
        rows=_film_rows,
        base=DATA / "stories260k" / "hf",
        settings={
            "data": {"prompt_tokens": 12, "max_length": 160},
            "reward": {"type": "sentiment_lexicon"},
            "sampling": {"max_new_tokens": 32},
            "sft": {"batch_size": 32},
            "ppo": {**PPO, "entropy_coef": 0.01},
        },
        kl_coef=0.05,
        budget=250_000,
        sft_lr=1e-3,
        ppo_lr=1e-4,
    ),
}
