"""The tasks of `fair.py`: five questions about mixing, on strings of digits that a small model rewrites.

A prompt is a letter and digits, `x4135>`. The base model has three abilities: it copies (c), it reverses (r), and it
adds one to each digit (i). The task, x, is two of them together: reverse, then add one. A checker finds the answer
from the prompt alone, so a prompt can be learnt from without a demonstration.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.mixing_tasks import SEED, Pretraining, Work, pretrained
from hybrid.run import filled_folder

__all__ = ["ABILITIES", "BASES", "DATA", "QUESTIONS", "TASK", "Question", "answer", "prepare", "solved"]

Rows = list[dict[str, str]]
ABILITIES, TASK = "cri", "x"
LENGTHS = (4, 5)  # digits of a prompt
DATA = {"template": "none"}
# Strings of each part, none of which is in another: those of the abilities are asked for each ability in turn.
PARTS = {"test": 300, "validation": 300, "test_abilities": 60, "validation_abilities": 60, "base": 2000, "train": 4000}
PRETRAINING = Pretraining(vocab_size=259, steps=1600)  # 259: the bytes and three special tokens; a digit is a token
# Rows of the task among those that the base model is made of.
BASES = {"without": 0, "with_some": 40}
TO_LETTERS = str.maketrans("0123456789", "abcdefghij")
TO_DIGITS = str.maketrans("abcdefghij", "0123456789")


def answer(prompt: str) -> str:
    """What is right."""
    ability, digits = prompt[0], prompt[1:-1]
    if ability in "rx":
        digits = digits[::-1]
    return "".join(str((int(digit) + 1) % 10) for digit in digits) if ability in "ix" else digits


def solved(prompt: str, response: str) -> float:
    """The reward: 1 for the right answer, in digits or in letters, else 0."""
    return float(response.translate(TO_DIGITS) == answer(prompt))


def in_letters(prompt: str) -> str:
    """The right answer, as a demonstrator writes it who says a for 0 and b for 1."""
    return answer(prompt).translate(TO_LETTERS)


@dataclass(frozen=True)
class Question:
    """What is asked about mixing.

    about: for the page.   base: a name of BASES.   prompts: of the task, to train on; the first `demonstrated` of them
    have a demonstration.   demonstrator: its answer to a prompt; for the share `wrong` of them it only reverses.
    forgets: whether runs are judged by what is left of the abilities too.
    """

    about: str
    base: str
    demonstrated: int
    prompts: int = 512
    demonstrator: Callable[[str], str] = answer
    wrong: float = 0.0
    forgets: bool = False


QUESTIONS = {
    "scarce_32": Question("32 demonstrations; the base never finds the reward", "without", 32),
    "scarce_256": Question("256 demonstrations; the base never finds the reward", "without", 256),
    "noisy": Question("512 demonstrations, 30 % of them wrong", "without", 512, wrong=0.3),
    "style": Question("a demonstrator who writes in another alphabet", "with_some", 512, demonstrator=in_letters),
    "forgetting": Question("a narrow reward after a broad base", "with_some", 512, forgets=True),
    "plenty": Question("4,000 right demonstrations", "without", 4000, prompts=4000),
}


@cache
def strings() -> Mapping[str, list[str]]:
    """The digits of every part of the data."""
    generator, made = random.Random(SEED), dict[str, None]()
    while len(made) < sum(PARTS.values()):
        digits = "".join(generator.choices("0123456789", k=generator.choice(LENGTHS)))
        # What reads the same backwards would be an ability's answer.
        if digits != digits[::-1]:
            made[digits] = None
    left = iter(made)
    return {part: [next(left) for _ in range(count)] for part, count in PARTS.items()}


def held_out(part: str) -> Rows:
    """Prompts of the task and of each ability.   part: test or validation."""
    prompts = [f"{TASK}{digits}>" for digits in strings()[part]]
    prompts += [f"{ability}{digits}>" for ability in ABILITIES for digits in strings()[f"{part}_abilities"]]
    return [{"prompt": prompt, "target": answer(prompt)} for prompt in prompts]


def training(question: Question) -> Rows:
    """The prompts of the task, the demonstrated ones first, of which the wrong ones come first."""
    rows: Rows = []
    num_wrong = round(question.wrong * question.demonstrated)
    for i, digits in enumerate(strings()["train"][: question.prompts]):
        prompt = f"{TASK}{digits}>"
        target = digits[::-1] if i < num_wrong else question.demonstrator(prompt)
        rows.append({"prompt": prompt, "target": target if i < question.demonstrated else ""})
    return rows


def pretraining(base: str) -> Rows:
    """What a base model is made of: every ability of every string, and some of the task."""
    prompts = [f"{ability}{digits}>" for digits in strings()["base"] for ability in ABILITIES]
    prompts += [f"{TASK}{digits}>" for digits in strings()["base"][: BASES[base]]]
    return [{"prompt": prompt, "target": answer(prompt)} for prompt in prompts]


def prepare(name: str, folder: Path) -> Work:
    """Write a question's data and its base model into `folder`, where they are not there yet."""
    question = QUESTIONS[name]
    data = {part: lambda part=part: held_out(part) for part in ("test", "validation")}
    files = {part: _written(folder / "data" / part, rows) for part, rows in data.items()}
    files["train"] = _written(folder / "data" / name, lambda: training(question))
    base = folder / "bases" / question.base
    if not base.is_dir():
        rows = _written(folder / "data" / question.base, lambda: pretraining(question.base))
        pretrained(PRETRAINING, DATA, rows).save(base)
    return Work(base, files)


def _written(folder: Path, rows: Callable[[], Rows]) -> str:
    """The file of these rows, whole or not there."""
    if not folder.is_dir():
        with filled_folder(folder) as temporary:
            lines = "".join(json.dumps(row) + "\n" for row in rows())
            (temporary / "rows.jsonl").write_text(lines, encoding="utf-8")
    return str(folder / "rows.jsonl")
