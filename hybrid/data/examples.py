"""From rows to examples: which rows are kept, in which order, and one line that says what was taken."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrid.core import IGNORE, Example, InputError, first_line, load_object
from hybrid.data.columns import columns_of, layout_of, listed
from hybrid.data.config import DataConfig
from hybrid.data.files import Part
from hybrid.data.folders import HELD_OUT
from hybrid.data.preferences import Flawed, Ranked
from hybrid.data.read import read_parts, read_rows, splits_of

__all__ = [
    "ExampleSet",
    "data_line",
    "examples_from",
    "read_example_set",
    "read_examples",
    "read_pairs",
    "read_training_sets",
    "split_examples",
]

logger = logging.getLogger(__name__)

# A row, and its place in messages.
Placed = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ExampleSet:
    """The examples of one source.

    said: where they are from, which column is what, and what is not used.
    num_blank: plain texts that were left out, having nothing in them.
    """

    examples: list[Example]
    said: str
    num_blank: int = 0


def read_examples(source: Any, config: DataConfig, *, seed: int = 0) -> list[Example]:
    """The examples of a source (see `read_rows`), filtered, shuffled and limited as the config says.

    The order is a pure function of the rows and the seed. Plain text rows that are blank are left out and counted.
    What was taken is logged. Raises InputError where no row is left, and what `examples_from` refuses.
    """
    read = read_example_set(source, config, seed=seed)
    level = logging.WARNING if read.num_blank else logging.INFO
    logger.log(level, data_line(len(read.examples), "", read.said))
    return read.examples


def read_pairs(source: Any, config: DataConfig, *, seed: int = 0) -> list[Example]:
    """The examples of a source that are pairs of answers: `target` was chosen, `rejected.target` was not.

    See `read_examples`. Raises InputError where there is no pair.
    """
    examples = read_examples(source, config, seed=seed)
    pairs = [e for e in examples if e.rejected is not None and _has_target(e)]
    if not pairs:
        raise InputError(
            f"none of the {len(examples)} examples is a pair of answers; name the columns with data.chosen and "
            "data.rejected"
        )
    return pairs


def read_example_set(source: Any, config: DataConfig, *, seed: int = 0, name: str = "data") -> ExampleSet:
    """`read_examples`, with what there is to say of them.   name: what an object in memory is called in messages."""
    parts = read_parts(source, format=config.format, name=name)
    title = _title(parts)
    placed: list[Placed] = [
        (f"{part.name}, row {i}", row) for part in parts for i, row in enumerate(part.rows, start=1)
    ]
    notes = []
    if config.filter is not None:
        kept = _filtered(placed, config.filter)
        if not kept:
            raise InputError(f"{title}: DataConfig.filter = {config.filter!r} keeps none of {len(placed)} rows")
        notes.append(f"data.filter kept {len(kept):,} of {len(placed):,} rows")
        placed = kept
    of_rows, said, flaws = _mapped(placed, config, title)
    left_out = [f"left out {count:,} {'pair' if count == 1 else 'pairs'} {reason}" for reason, count in flaws.items()]
    if not any(of_rows):
        raise InputError(f"{title}: no row is left of {len(placed)}: {', '.join(left_out)}")
    notes += left_out
    mapped = [of_row for of_row in of_rows if of_row]
    of_rows = [of_row for of_row in mapped if not _is_blank(of_row[0])]
    if not of_rows:
        raise InputError(f"{title}: all {len(mapped)} rows are blank")
    num_blank = len(mapped) - len(of_rows)
    examples = [e for of_row in of_rows for e in of_row]
    if num_blank:
        notes.append(f"left out {num_blank:,} blank {'row' if num_blank == 1 else 'rows'}")
    if num_bad := sum(e.rejected is not None and not e.target for e in examples):
        notes.append(f"{num_bad:,} {'answer is' if num_bad == 1 else 'answers are'} bad, and never imitated")
    if num_prompts := sum(not _has_target(e) and e.rejected is None for e in examples):
        notes.append(f"{num_prompts:,} without a target, for rollouts only")
    if config.shuffle:
        random.Random(seed).shuffle(of_rows)
    if config.limit is not None and config.limit < len(of_rows):
        notes.append(f"the first {config.limit:,} of {len(of_rows):,} (data.limit)")
    of = "" if title == "data" else f" of {title}"
    taken = [e for of_row in of_rows[: config.limit] for e in of_row]
    return ExampleSet(taken, "; ".join([f"{of}: {said}", *notes]), num_blank)


def data_line(count: int, what: str, said: str) -> str:
    """The line that tells a user what was taken: "data: 1,482 training examples of reviews.jsonl: prompt = …"."""
    return f"data: {count:,} {what}{' ' if what else ''}{'example' if count == 1 else 'examples'}{said}"


def examples_from(rows: Iterable[Mapping[str, Any]], config: DataConfig) -> list[Example]:
    """One example for each row, in their order, by the config's columns, or else by what all the columns are.

    Raises InputError, with the row's number: a missing column, a value that is not text (numbers become text), a pair
    of equal sides or with an empty one, an empty prompt, a dialogue that is not a list of {"role", "content"} with a
    user's turn to answer.
    """
    placed = [(f"data, row {i}", row) for i, row in enumerate(read_rows(rows), start=1)]
    of_rows, _, _ = _mapped(placed, config, "data", drop=False)
    return [e for of_row in of_rows for e in of_row]


def read_training_sets(
    source: Any, config: DataConfig, *, seed: int = 0, hold_out: bool = True
) -> tuple[ExampleSet, ExampleSet]:
    """(training, held-out) examples of a source: of one with splits `train`, and the first of HELD_OUT that is there.

    hold_out: whether to read that one.   Raises InputError where no split is called train.
    """
    splits = splits_of(source, format=config.format)
    if splits is None:
        return read_example_set(source, config, seed=seed), ExampleSet([], "")
    if "train" not in splits:
        names = ", ".join(map(repr, splits))
        raise InputError(f"the data has no split 'train', and has {names}; choose one of them")
    held_out = next((name for name in HELD_OUT if hold_out and name in splits), None)
    unused = [repr(name) for name in splits if name not in ("train", held_out)]
    train = read_example_set(splits["train"], config, seed=seed, name="split 'train'")
    train = replace(train, said=train.said + (f"; unused splits: {', '.join(unused)}" if unused else ""))
    if held_out is None:
        return train, ExampleSet([], "")
    read = read_example_set(splits[held_out], config, seed=seed, name=f"split {held_out!r}")
    return train, replace(read, said=read.said + ("; no split is called validation" if held_out == "test" else ""))


def split_examples(examples: Sequence[Example], fraction: float, *, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, eval): a random `fraction` of the examples, at least one where it is > 0, is held out.

    Of preferences it is the fraction of the prompts: all that is known of one stays together.
    A pure function of the examples' order and the seed; both parts keep that order.
    """
    groups = _by_prompt(examples)
    count = max(1, round(fraction * len(groups))) if fraction else 0
    if count and count >= len(groups):
        prompts = "" if len(groups) == len(examples) else f" (the number of their prompts is {len(groups)})"
        raise InputError(f"holding out {fraction} of {len(examples)} examples{prompts} leaves none to train on")
    held_out = {i for group in random.Random(seed).sample(range(len(groups)), count) for i in groups[group]}
    train = [example for i, example in enumerate(examples) if i not in held_out]
    return train, [examples[i] for i in sorted(held_out)]


def _by_prompt(examples: Sequence[Example]) -> list[list[int]]:
    """The numbers of the examples: preferences to one prompt together, other examples each alone."""
    if all(e.rejected is None for e in examples):
        return [[i] for i in range(len(examples))]
    groups: dict[str, list[int]] = {}
    for i, e in enumerate(examples):
        start = e.messages[: e.num_prompt_messages]
        groups.setdefault(repr((start or e.prompt, e.tools)), []).append(i)
    return list(groups.values())


def _filtered(placed: Sequence[Placed], name: str) -> list[Placed]:
    try:
        keep: Callable[[Mapping[str, Any]], Any] = load_object(name, what="DataConfig.filter")
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"DataConfig.filter = {name!r} raised {type(error).__name__} when imported: {first_line(error)}"
        ) from error
    if not callable(keep):
        raise InputError(f"DataConfig.filter = {name!r} must be a function, got {type(keep).__name__}")
    return [(place, row) for place, row in placed if _keeps(keep, row, f"{place}: DataConfig.filter = {name!r}")]


def _keeps(keep: Callable[[Mapping[str, Any]], Any], row: Mapping[str, Any], where: str) -> bool:
    try:
        answer = keep(row)
    except Exception as error:
        raise InputError(f"{where} raised {type(error).__name__}: {first_line(error)}") from error
    # numpy's and torch's truth is no bool.
    answer = answer.item() if hasattr(answer, "item") else answer
    if not isinstance(answer, int):
        raise InputError(f"{where} must return true or false, got {answer!r:.60}")
    return bool(answer)


def _mapped(
    placed: Sequence[Placed], config: DataConfig, name: str, *, drop: bool = True
) -> tuple[list[list[Example]], str, Counter[str]]:
    """Each row's examples (a ranking has several), which column is what, and how many pairs were left out, and why.

    drop: whether these are left out; else they are an InputError.
    """
    rows = [row for _, row in placed]
    layout = layout_of(rows, config, name)
    of_rows: list[list[Example]] = []
    flaws: Counter[str] = Counter()
    for place, row in placed:
        flawed: list[Flawed] = []
        try:
            if isinstance(layout, Ranked):
                made, flawed = layout.examples(row, place)
                of_rows.append(made)
            else:
                of_rows.append([layout.example(row, place)])
        except Flawed as flaw:
            flawed = [flaw]
        if flawed and not drop:
            raise flawed[0]
        flaws.update(flaw.reason for flaw in flawed)
    unused = [column for column in columns_of(rows) if column not in (*layout.needs, *layout.takes)]
    return of_rows, layout.says() + (f"; unused columns: {listed(unused)}" if unused else ""), flaws


def _is_blank(example: Example) -> bool:
    """Whether it is plain text with nothing in it."""
    return not (example.prompt or example.input_ids or example.target.strip())


def _has_target(example: Example) -> bool:
    if example.messages:
        return any(message["role"] == "assistant" for message in example.messages[example.num_prompt_messages :])
    return bool(example.target) or any(label != IGNORE for label in example.labels[1:])


def _title(parts: Sequence[Part]) -> str:
    if len(parts) == 1:
        return parts[0].name
    return f"{len(parts)} files ({parts[0].name} … {parts[-1].name})"
