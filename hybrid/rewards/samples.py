"""What a reward is asked about: a batch of samples, put in order before any reward sees it."""

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

__all__ = ["Samples", "Target", "has_text", "rows_with_text", "shortened"]

# Half of a UTF-16 pair is no character, but JSON can hold one, and tokenizers raise on it.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Target = str | Sequence[str]  # one reference, or several


class Samples(NamedTuple):
    """B samples: four lists of one length. A target is a text, or several references.

    A user may leave columns and texts out; `checked` puts "" there. Only where no sample has a target are all None.
    """

    responses: Any
    targets: Any = None
    prompts: Any = None
    items: Any = None

    @classmethod
    def checked(cls, responses: Any, targets: Any, prompts: Any, items: Any) -> "Samples":
        """The same with every column there, as long as `responses`, and every text a str. Raises ValueError."""
        columns = {"responses": responses, "targets": targets, "prompts": prompts, "items": items}
        for name, column in columns.items():
            if isinstance(column, str):
                raise ValueError(f"{name} must be a list, got one text; for one sample call reward(response, target)")
            if column is not None and len(column) != len(responses):
                raise ValueError(f"{name} must be as many as responses: got {len(column)} for {len(responses)}")
        empty = [None] * len(responses)
        checked = [_target(target, f"targets[{i}]") for i, target in enumerate(empty if targets is None else targets)]
        some = any(target is not None for target in checked)
        return cls(
            [_text(text, f"responses[{i}]") for i, text in enumerate(responses)],
            [target or "" for target in checked] if some else checked,
            [_text(text, f"prompts[{i}]") for i, text in enumerate(empty if prompts is None else prompts)],
            list(empty if items is None else items),
        )

    def of(self, rows: Sequence[int]) -> "Samples":
        """Some of the samples."""
        return Samples(*([column[i] for i in rows] for column in self))

    def copied(self, *, items: bool) -> "Samples":
        """The samples in lists that a reward may change. items: whether it may change these too."""
        targets = [list(x) if isinstance(x, list) else x for x in self.targets]
        own = list(self.items)
        for i, item in enumerate(self.items if items else ()):
            try:
                own[i] = copy.deepcopy(item)
            except Exception as error:
                raise ValueError(
                    f"items[{i}] cannot be copied for the reward, which must not change yours: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return Samples(list(self.responses), targets, list(self.prompts), own)

    def cut(self, num_chars: int) -> "tuple[Samples, int]":
        """The samples with every text cut to `num_chars` characters, and how many samples that changed."""
        cut = Samples(
            [text[:num_chars] for text in self.responses],
            [[t[:num_chars] for t in x] if isinstance(x, list) else x and x[:num_chars] for x in self.targets],
            [text[:num_chars] for text in self.prompts],
            self.items,
        )
        changed = sum(
            before != after for before, after in zip(zip(*self, strict=True), zip(*cut, strict=True), strict=True)
        )
        return cut, changed


def has_text(target: Any) -> bool:
    """Whether there is anything but white space in a target, or in one of several references."""
    texts = target if isinstance(target, (list, tuple)) else [target]
    return any(text is not None and str(text).strip() for text in texts)


def rows_with_text(pairs: Iterable[tuple[str, str]]) -> list[int]:
    """Which of the pairs have two texts that hold more than white space."""
    return [i for i, pair in enumerate(pairs) if all(text.strip() for text in pair)]


def shortened(text: str, width: int = 80) -> str:
    """The text in quotes, cut for a message."""
    return repr(text if len(text) <= width else text[: width - 1] + "…")


def _text(text: Any, place: str) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{place} must be a text or None, got {text!r}")
    return LONE_SURROGATE.sub("\ufffd", text)


def _target(target: Any, place: str) -> Target | None:
    """One reference as a text, several as a list of at least two; None for none."""
    if target is None or (isinstance(target, (list, tuple)) and not target):
        return None
    if not isinstance(target, (list, tuple)):
        return _text(target, place)
    references = [_text(reference, f"{place}[{i}]") for i, reference in enumerate(target)]
    return references if len(references) > 1 else "".join(references)
