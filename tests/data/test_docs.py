"""docs/data.md: its table of layouts is the code's, and every row in it is read as it says."""

import json
from pathlib import Path

import pytest

from hybrid.core import IGNORE
from hybrid.data import DataConfig, read_examples
from hybrid.data.columns import LAYOUTS
from hybrid.data.files import DATA_SUFFIXES
from hybrid.data.folders import HELD_OUT

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
_, _, TABLE = PAGE.partition("| columns | a row | prompt | trained |\n")
LINES = [line.strip("| ").split(" | ") for line in TABLE.partition("\n\n")[0].splitlines()[1:]]


def test_the_page_has_every_layout_in_its_order():
    assert [line[0] for line in LINES] == [
        ", ".join(layout.needs) + (f" [{', '.join(layout.takes)}]" if layout.takes else "") for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("columns", "row", "prompt", "trained"), LINES, ids=lambda cell: cell)
def test_a_row_of_the_page_is_read_as_it_says(columns, row, prompt, trained):
    (example,) = read_examples([json.loads(row.strip("`"))], DataConfig())
    if prompt.startswith("`"):
        assert example.prompt == prompt.strip("`").replace(r"\n", "\n")
    answers = [m["content"] for m in example.messages if m["role"] == "assistant"]
    ids = [label for label in example.labels if label != IGNORE]
    said = str(ids) if ids else " ".join(answers) or example.target
    assert said == (trained.strip("`") if trained.startswith("`") else "")


def test_the_page_names_every_suffix_and_split():
    assert all(f"`{name}`" in PAGE for name in (*DATA_SUFFIXES, *HELD_OUT))
