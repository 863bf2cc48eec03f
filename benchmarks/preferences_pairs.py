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
    few_share: of the pairs, and of the budget, that the weak reward models are trained on.
    """

    budget: int = 100_000
    points: tuple[float, ...] = field(default=(1 / 8, 1 / 4, 1 / 2))
    steps: int = 300
    prompts: int | None = None
    pairs_per_prompt: int = 2
    flip_share: float = 0.1
    few_share: float = 0.1

    @property
    def task(self) -> Task:
        """The mixing study's reviews, with its base model."""
        return replace(TASKS["reviews"], base=Pretraining(vocab_size=1280, steps=self.steps))


@dataclass(frozen=True)
class Prepared:
    """What the runs of one seed share.

    base: folder of the model that all start from.   prompts: file of held-out reviews.
    train, few, held_out: files of pairs, `few` the beginning of `train`.
    counts: what became of the pairs, by file.
    """

    base: Path
    train: str
    few: str
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
        rows = {name: _sampled(size, made_of, source, seed) for name, source in files.items()}
        rows["few"] = rows["train"][: round(size.few_share * len(rows["train"]))]
        folder.mkdir(parents=True, exist_ok=True)
        for name, of_file in rows.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_file)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        return {
            "counts": {
                name: {"pairs": len(of_file), "flipped": sum(row["is_flipped"] for row in of_file)}
                for name, of_file in rows.items()
            }
        }

    about = {"size": json.loads(json.dumps(asdict(size))), "files": files}
    counts = kept(folder / "pairs.json", about, made)["counts"]
    train, few, held_out = (str(folder / f"{name}.jsonl") for name in ("train", "few", "held_out"))
    return Prepared(made_of.base, train, few, held_out, made_of.files[part], counts)


def _sampled(size: Size, work: Work, source: str, seed: int) -> list[Row]:
    """Pairs of answers to the prompts of a file of reviews, with the wrong labels among them."""
    prompts = list(dict.fromkeys(row["prompt"] for row in read_rows(source)))[: size.prompts]
    rows = pairs(work.base, prompts * size.pairs_per_prompt, seed=seed)
    return flipped(rows, size.flip_share, seed=seed)


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
