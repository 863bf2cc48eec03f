"""Tests of hybrid.data.read."""

import pytest
from data.refusals import source_refusal

from hybrid.data import read_rows


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"x": "1"}, {"x": "2"}]'),
        ("a.json", '{"version": 3, "data": [{"x": "1"}, {"x": "2"}]}'),
        ("a.jsonl", '{"x": "1"}\n\n{"x": "2"}\n'),
        ("a.jsonl", '{"x": "1"}\r\n{"x": "2"}'),
        ("a.csv", "x\n1\n\n2\n"),
        ("a.tsv", "x\n1\n2\n"),
        ("a.jsonl", b'\xef\xbb\xbf{"x": "1"}\n{"x": "2"}'),
        ("a.csv", b"\xef\xbb\xbfx\n1\n2"),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, content):
    assert read_rows(written(tmp_path, name, content)) == [{"x": "1"}, {"x": "2"}]


def test_a_text_file_gives_its_stripped_lines_that_are_not_blank(tmp_path):
    rows = read_rows(written(tmp_path, "a.txt", " one \n\n  \ntwo\r\n"))
    assert rows == [{"text": "one"}, {"text": "two"}]


def test_a_list_of_files_is_read_one_after_the_other(tmp_path):
    paths = [written(tmp_path, "a.txt", "one"), written(tmp_path, "b.jsonl", '{"text": "two"}')]
    assert read_rows(paths) == [{"text": "one"}, {"text": "two"}]


def test_a_line_separator_inside_a_json_string_does_not_end_the_row(tmp_path):
    assert read_rows(written(tmp_path, "a.jsonl", '{"x": "1\u20282"}')) == [{"x": "1\u20282"}]


def test_a_csv_field_may_hold_commas_quotes_and_line_breaks(tmp_path):
    assert read_rows(written(tmp_path, "a.csv", 'x,y\n"a, ""b""\nc",d\n')) == [{"x": 'a, "b"\nc', "y": "d"}]


def test_a_quote_in_a_tab_separated_field_is_part_of_the_text(tmp_path):
    assert read_rows(written(tmp_path, "a.tsv", 'x\ty\n"So" he said\t1\n')) == [{"x": '"So" he said', "y": "1"}]


@pytest.mark.parametrize(
    ("name", "content", "place", "reason"),
    [
        ("a.jsonl", '{"x": 1}\n\n{"x": 1 "y": 2}\n', "a.jsonl:3", "not valid JSON (Expecting ',' delimiter"),
        ("a.jsonl", '{"x": 1}\n[1]\n', "a.jsonl:2", "object"),
        ("a.json", '[\n{"x": 1},\n{"x" 2}]', "a.json:3", "not valid JSON (Expecting ':' delimiter"),
        ("a.json", '[{"x": 1}, 2]', "a.json", "object"),
        ("a.json", "3", "a.json", "list of objects"),
        ("a.json", '{"a": [], "b": []}', "a.json", "one list"),
        ("a.csv", 'x,y\n"1\n1",2\n3\n', "a.csv:4", "1 fields"),
        ("a.csv", "x,x\n1,2\n", "a.csv:1", "twice"),
        ("a.csv", 'x\n"1\n', "a.csv:2", "not valid CSV"),
        ("a.txt", b"one\ntw\xf6\n", "a.txt:2", "not UTF-8"),
        ("a.jsonl", "\n \n", "a.jsonl", "no rows"),
        ("a.json", "", "a.json", "no rows"),
        ("a.csv", "x,y\n", "a.csv", "no rows"),
    ],
)
def test_a_bad_file_is_refused_with_its_place_and_reason(tmp_path, name, content, place, reason):
    message = source_refusal(written(tmp_path, name, content))
    assert place in message
    assert reason in message


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path):
    written(tmp_path, "reviews.jsonl", "{}")
    assert "reviews.jsonl" in source_refusal(str(tmp_path / "revews.jsonl"))


def test_a_suffix_that_says_nothing_needs_the_format(tmp_path):
    path = written(tmp_path, "a.neg", "one")
    assert "data.format" in source_refusal(path)
    assert read_rows(path, format="text") == [{"text": "one"}]


def test_rows_in_memory_are_numbered_from_one_when_refused():
    assert "row 2" in source_refusal([{"x": 1}, "two"])
    assert "no rows" in source_refusal([])


def test_a_datasets_object_gives_its_rows():
    from datasets import Dataset

    assert read_rows(Dataset.from_dict({"x": ["1", "2"]})) == [{"x": "1"}, {"x": "2"}]


def test_a_mapping_of_splits_is_refused_with_their_names():
    assert "'train', 'test'" in source_refusal({"train": [], "test": []})


def test_a_name_that_is_no_file_is_loaded_from_the_hub_with_its_split(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or [{"x": 1}])
    assert read_rows("org/name") == read_rows("org/name:test") == [{"x": 1}]
    assert asked == [("org/name", "train"), ("org/name", "test")]


def test_a_hub_failure_is_refused_in_one_line(monkeypatch):
    import datasets

    def fail(name, split):
        raise ConnectionError("Couldn't reach the Hub\nwith details")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = source_refusal("org/name")
    assert "org/name" in message
    assert "Couldn't reach the Hub" in message
    assert "\n" not in message


def test_rotten_tomatoes_reads_as_text(shared):
    rows = read_rows(shared / "rotten_tomatoes" / "rt-polarity.neg", format="text")
    assert len(rows) == 5331
    assert rows[0] == {"text": "simplistic , silly and tedious ."}


def test_glue_tab_separated_rows_keep_their_quotes(shared):
    rows = read_rows(shared / "rte" / "dev.tsv")
    assert len(rows) == 277
    # Counted in the raw file: 54 fields begin with a quote.
    assert sum(value.startswith('"') for row in rows for value in row.values()) == 54


def test_truthfulqa_reads_as_csv(shared):
    assert len(read_rows(shared / "truthfulqa" / "TruthfulQA.csv")) == 817
