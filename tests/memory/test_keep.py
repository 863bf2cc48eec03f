"""A memory as a file: whole, or refused by name."""

import json

import pytest
from memory_case import examples, told

from hybrid.core import InputError
from hybrid.memory import load_memory, make_memory, read_memory, write_memory

KINDS = ("experience", "markov")


def written(folder, kind, **settings):
    memory = make_memory({"type": kind, **settings})
    memory.attach(examples(4))
    write_memory(told(memory, {0: (1.0, 0.0), 1: (1.0,), 2: (0.0,), 3: (0.5,)}), folder)
    return folder / "memory.jsonl"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_is_read(kind, tmp_path):
    file = written(tmp_path, kind)
    again = make_memory({"type": kind})
    load_memory(again, file)
    assert [*again.rows()] == read_memory(tmp_path)["rows"] and len(again.rows()) >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_lost_its_end_is_refused(kind, tmp_path):
    file = written(tmp_path, kind)
    for cut in (lambda text: text[:-5], lambda text: "".join(text.splitlines(True)[:-2])):
        file.write_text(cut(written(tmp_path, kind).read_text()))
        with pytest.raises(InputError, match=r"memory.jsonl' is not whole: \d of its \d rows are there"):
            load_memory(make_memory({"type": kind}), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_that_lacks_something_is_told(kind, tmp_path):
    file = written(tmp_path, kind)
    head, *rows = file.read_text().splitlines(True)
    header = json.loads(head)
    del header["recent" if kind == "experience" else "draws"]
    file.write_text(json.dumps(header) + "\n" + "".join(rows))
    with pytest.raises(InputError, match=f"holds no {kind} memory as this version writes it: KeyError"):
        load_memory(make_memory({"type": kind}), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_capacity_holds_for_what_is_loaded(kind, tmp_path):
    written(tmp_path, kind)
    small = make_memory({"type": kind, "capacity": 2})
    load_memory(small, tmp_path)
    # A chain has states beside its pairs.
    assert len(small.rows()) == (2 if kind == "experience" else 4)
