"""What the arms of `preferences.py` learn from: pairs of a base model's answers, some of them with the wrong label."""

import json
import random
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.kept import kept
from benchmarks.mixing_tasks import TASKS, Pretraining, Task, Work, prepare
from hybrid import HybridConfig, HybridTrainer, make_reward
from hybrid.data import read_rows

__all__ = ["GOLD", "SAMPLING", "Prepared", "Size", "flipped", "preferences"]

GOLD = {"type": "sentiment_lexicon"}  # who prefers: VADER's compound of the answer
SAMPLING = {"max_new_tokens": 40}
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large the study is.

    budget: tokens that an arm is trained on, and a reward model.   points: shares of it at which an arm is measured.
    steps: of the base model's training.   prompts: of each part that are used; None: all.
    """

    budget: int = 150_000
    points: tuple[float, ...] = field(default=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4))
    steps: int = 300
    prompts: int | None = None
    pairs_per_prompt: int = 2
    flip_share: float = 0.1

    @property
    def task(self) -> Task:
        """The mixing study's reviews, with its base model."""
        return replace(TASKS["reviews"], base=Pretraining(vocab_size=1280, steps=self.steps))


@dataclass(frozen=True)
class Prepared:
    """What the runs of one seed share.

    base: folder of the model that all start from.   train, held_out: files of pairs.   prompts: of held-out reviews.
    counts: what became of the pairs, by file.
    """

    base: Path
    train: str
    held_out: str
    prompts: str
    counts: dict[str, dict[str, int]]


def preferences(size: Size, work: Path, seed: int, *, part: str) -> Prepared:
    """Pairs of the base model's answers by the gold reward, made where they are not there yet.

    part: of the reviews, whose prompts are held out: "test", or "validation" for the learning rates.
    """
    made_of = prepare(size.task, work)
    folder = work / f"pairs-{seed}"
    files = {"train": made_of.files["train"], "held_out": made_of.files[part]}

    def made() -> dict[str, Any]:
        return {"counts": {name: _written(size, made_of, source, folder / f"{name}.jsonl", seed)
                           for name, source in files.items()}}  # fmt: skip

    about = {"size": json.loads(json.dumps(asdict(size))), "files": files}
    counts = kept(folder / "pairs.json", about, made)["counts"]
    train, held_out = (str(folder / f"{name}.jsonl") for name in files)
    return Prepared(made_of.base, train, held_out, made_of.files[part], counts)


def _written(size: Size, work: Work, source: str, file: Path, seed: int) -> dict[str, int]:
    """Write the pairs to the prompts of a file of reviews; returns how many there are of each kind."""
    prompts = list(dict.fromkeys(row["prompt"] for row in read_rows(source)))[: size.prompts]
    sampled = pairs(work.base, prompts * size.pairs_per_prompt, seed=seed)
    rows = flipped(sampled, size.flip_share, seed=seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {
        "pairs": len(rows),
        "ties": len(prompts) * size.pairs_per_prompt - len(rows),
        "flipped": sum(row["is_flipped"] for row in rows),
    }


def pairs(base: Path, prompts: Sequence[str], *, seed: int) -> list[Row]:
    """Two answers of the model to each prompt, the one with more gold reward as `chosen`; ties are left out."""
    config = HybridConfig.from_dict({
        "model": {"name": str(base)}, "data": {"template": "none"}, "sampling": SAMPLING,
        "eval": {"batch_size": 128}, "run": {"seed": seed},
    })  # fmt: skip
    with redirect_stdout(StringIO()):
        answers = HybridTrainer(config=config).generate([prompt for prompt in prompts for _ in range(2)])
    gold = make_reward(GOLD).score(answers)
    rows = []
    for i, prompt in enumerate(prompts):
        best, other = sorted((2 * i, 2 * i + 1), key=lambda j: -gold[j])
        # An answer of nothing but EOS is an empty side, of which no pair is made.
        if gold[best] > gold[other] and answers[best].strip() and answers[other].strip():
            rows.append({"prompt": prompt, "chosen": answers[best], "rejected": answers[other]})
    return rows


def flipped(rows: Sequence[Row], share: float, *, seed: int) -> list[Row]:
    """The pairs, of which exactly that share, to rounding, has its sides exchanged; `is_flipped` says which."""
    swapped = set(random.Random(f"flips/{seed}").sample(range(len(rows)), round(share * len(rows))))
    return [
        {
            **row,
            **({"chosen": row["rejected"], "rejected": row["chosen"]} if i in swapped else {}),
            "is_flipped": i in swapped,
        }
        for i, row in enumerate(rows)
    ]
