"""Tests of hybrid.data.read on what is no plain file, and of hybrid.data.columnar."""

import bz2
import gzip
import lzma
import os

import datasets
import numpy
import pandas
import pyarrow
import pytest
import torch
from data.refusals import source_refusal
from pyarrow import feather, parquet

from hybrid.data import read_rows
from hybrid.data.read import splits_of

ROWS = [{"x": "1", "n": 1}, {"x": "2", "n": 2}]
LINES = '{"x": "1", "n": 1}\n{"x": "2", "n": 2}\n'
TABLE = pyarrow.Table.from_pylist(ROWS)


class MapStyle:
    """As a torch data set: a length and items, and nothing to iterate."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return ROWS[index]


class Streamed:
    """As a Polars frame: it gives itself by Arrow's protocol."""

    def __arrow_c_stream__(self, requested_schema=None):
        return TABLE.__arrow_c_stream__(requested_schema)


def arrow_stream(path):
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, TABLE.schema) as writer:
        writer.write_table(TABLE)


def arrow_file(path):
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, TABLE.schema) as writer:
        writer.write_table(TABLE)


def written(table):
    with pyarrow.BufferOutputStream() as stream:
        parquet.write_table(table, stream)
        return stream.getvalue().to_pybytes()


WRITERS = {
    "a.parquet": lambda path: parquet.write_table(TABLE, path),
    "a.feather": lambda path: feather.write_feather(TABLE, path),
    "file.arrow": arrow_file,
    "stream.arrow": arrow_stream,
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "a.JSONL.GZ": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "a.ndjson.bz2": lambda path: path.write_bytes(bz2.compress(LINES.encode())),
    "a.parquet.gz": lambda path: path.write_bytes(gzip.compress(written(TABLE))),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES.encode())),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_or_folder_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert read_rows(tmp_path / name) == read_rows(str(tmp_path / name)) == ROWS


@pytest.mark.parametrize(
    "source",
    [
        TABLE,
        pandas.DataFrame(ROWS),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).with_format("numpy"),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        MapStyle(),
        Streamed(),
        {"x": ["1", "2"], "n": [1, 2]},
        tuple(ROWS),
        ROWS,
    ],
    ids=lambda source: type(source).__name__,
)
def test_every_object_gives_the_same_rows(source):
    assert read_rows(source) == ROWS


def test_an_iterator_gives_its_rows():
    assert read_rows(iter(ROWS)) == ROWS


def test_a_compressed_table_keeps_its_delimiter(tmp_path):
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b'x\ty\n"a,\t1\n'))
    assert read_rows(tmp_path / "a.tsv.gz") == [{"x": '"a,', "y": "1"}]


def test_a_pattern_gives_its_files_by_name(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert read_rows(str(tmp_path / "*.txt")) == [{"text": "a.txt"}, {"text": "b.txt"}]
    assert "a.txt" in source_refusal(str(tmp_path / "a?.txt"))


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    assert read_rows(str(tmp_path / "a[1].txt")) == [{"text": "one"}]


def test_the_home_folder_may_be_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    assert read_rows("~/a.txt") == read_rows("~/*.txt") == [{"text": "one"}]


def test_a_folder_of_files_of_one_format_is_their_rows(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"x": 2}')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"x": 1}'))
    (tmp_path / "README.txt").write_text("about it")
    (tmp_path / "script.py").write_text("")
    assert read_rows(tmp_path) == [{"x": 1}, {"x": 2}]


def test_a_folder_of_several_formats_or_none_is_refused(tmp_path):
    assert "holds no data files" in source_refusal(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.csv").write_text("x\n1")
    assert "'a.jsonl', 'b.csv'" in source_refusal(tmp_path)
    (tmp_path / "inner").mkdir()
    assert "holds folders too ('inner')" in source_refusal(tmp_path)


def test_a_saved_dict_of_splits_is_read_by_split(tmp_path):
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    both.save_to_disk(tmp_path / "d")
    folder = str(tmp_path / "d")
    assert read_rows(f"{folder}:test") == ROWS[:1]
    assert list(splits_of(folder)) == ["train", "test"]
    assert f"{folder}:train" in source_refusal(folder)
    assert "did you mean 'test'" in source_refusal(f"{folder}:tests")


def test_a_folder_of_files_named_after_splits_is_read_by_split(tmp_path):
    (tmp_path / "train-00000-of-00002.jsonl").write_text('{"x": 1}')
    (tmp_path / "train-00001-of-00002.jsonl").write_text('{"x": 2}')
    (tmp_path / "test.jsonl").write_text('{"x": 3}')
    assert read_rows(f"{tmp_path}:train") == [{"x": 1}, {"x": 2}]
    assert read_rows(f"{tmp_path}:test") == [{"x": 3}]
    assert "'test', 'train'" in source_refusal(tmp_path)
    (tmp_path / "more.jsonl").write_text('{"x": 4}')
    assert "more.jsonl" in source_refusal(tmp_path)


def test_a_broken_list_of_splits_is_refused(tmp_path):
    for content in ("{", "[]", '{"splits": [1]}'):
        (tmp_path / "dataset_dict.json").write_text(content)
        assert "names no splits" in source_refusal(tmp_path)


def test_the_format_hf_leaves_a_folder_to_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [{"x": split}])
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "test.jsonl").write_text("{}")
    assert splits_of(tmp_path, format="hf") is None
    assert read_rows(tmp_path, format="hf") == [{"x": "train"}]


@pytest.mark.parametrize(
    "splits",
    [
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}),
        {"train_sft": ROWS, "test_sft": ROWS},
        {"train": "a.jsonl", "test": ["b.jsonl"]},
        {"one": pandas.DataFrame(ROWS)},
    ],
)
def test_a_mapping_of_data_sets_has_splits(splits):
    assert list(splits_of(splits)) == list(splits)
    assert repr(next(iter(splits))) in source_refusal(splits)


@pytest.mark.parametrize(
    "rows", [{"messages": [[{"role": "user"}]]}, {"x": ["a"]}, ROWS, "a.jsonl", pandas.DataFrame(ROWS)]
)
def test_what_is_one_set_of_rows_has_no_splits(rows):
    assert splits_of(rows) is None


def test_what_a_frame_calls_missing_is_none():
    frame = pandas.DataFrame({"s": ["a", None], "f": [1.5, float("nan")], "t": [pandas.Timestamp(0), pandas.NaT]})
    frame["i"] = pandas.array([1, pandas.NA], dtype="Int64")
    assert read_rows(frame)[1] == {"s": None, "f": None, "t": None, "i": None}


def test_a_key_that_a_struct_lacks_is_no_null_key(tmp_path):
    rows = [
        {
            "m": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"a": {"x": 1}}, {"a": {"y": 2}}]},
            ]
        }
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == read_rows(datasets.Dataset.from_list(rows)) == rows


def test_lists_in_a_frame_read_from_parquet_are_lists(tmp_path):
    rows = [{"m": [{"role": "user", "content": "a"}], "input_ids": [1, 2]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(pandas.read_parquet(tmp_path / "a.parquet")) == rows


def test_a_data_sets_transform_is_applied():
    given = datasets.Dataset.from_list(ROWS)
    given.set_transform(lambda batch: {"x": [value + "!" for value in batch["x"]]})
    assert read_rows(given) == [{"x": "1!"}, {"x": "2!"}]


def test_a_version_at_a_names_end_is_no_suffix(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [{"x": name}])
    assert read_rows("teknium/OpenHermes-2.5") == [{"x": "teknium/OpenHermes-2.5"}]


def test_an_error_of_a_transform_is_told_as_what_it_is():
    given = datasets.Dataset.from_list(ROWS)
    given.set_transform(lambda batch: batch["missing"])
    assert "raised KeyError after 0 rows" in source_refusal(given)


def forever():
    while True:
        yield {"x": 1}


def broken():
    yield {"x": 1}
    raise KeyError("no such thing")


def test_an_iterable_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr("hybrid.data.read.MAX_ROWS", 100)
    assert "more than 100 rows" in source_refusal(forever())
    assert len(read_rows([{"x": 1}] * 200)) == 200


FRAME = pandas.DataFrame([["a", "b"]])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "''"),
        ("a\0b.jsonl", "no file has"),
        ("x" * 5000 + ".jsonl", "not found"),
        (["Once upon a time there was", "a dragon who"], "a text is no data"),
        (broken(), "KeyError after 1 rows"),
        (torch.utils.data.ChainDataset([3]), "raised AssertionError after 0 rows"),
        (FRAME, "must be a text, got 0"),
        (pandas.DataFrame([["a", "b"]], columns=["x", "x"]), "two columns called 'x'"),
        (pandas.DataFrame({"x": []}), "no rows"),
        (pandas.Series(["a"]), "a Series is no table"),
        ({"x": ["a"], "y": ["b", "c"]}, "one length"),
        ({"prompt": "a", "target": "b"}, "is one row"),
        ([["a", "b"]], "must be an object"),
        ([{1: "a"}], "must be a text, got 1"),
        (b"abc", "bytes"),
        (3, "int"),
        ({}, "no rows"),
        (["a.jsonl", {"x": 1}], "row 1"),
        ("~nobody-has-this-name/a.jsonl", "not found"),
        ("/dev/null", "no regular file"),
        ("https://example.com/a.jsonl", "is an address"),
        (torch.utils.data.DataLoader([1]), "give its dataset"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_what_is_no_data_is_refused_by_name(source, message):
    assert message in source_refusal(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"{}", "as a Parquet file"),
        ("a.arrow", b"hello, this is text", "as an Arrow or Feather file"),
        ("a.feather", b"hello", "as an Arrow or Feather file"),
        ("a.parquet", b"", "no rows"),
        ("a.arrow", b"", "no rows"),
        ("a.jsonl.gz", b"", "no rows"),
        ("a.jsonl.bz2", b"", "no rows"),
        ("a.json", b"", "no rows"),
        ("a.txt", b"", "no rows"),
        ("a.tsv", b"x\n", "no rows"),
        ("a.jsonl.gz", b"{}", "not whole gz data"),
        ("a.jsonl.bz2", b"{}", "not whole bz2 data"),
        ("a.jsonl.xz", b"{}", "not whole xz data"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "not whole gz data"),
        ("a.jsonl.xz", lzma.compress(LINES.encode())[:-9], "not whole xz data"),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())[:-9], "not whole bz2 data"),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0), "gzip data"),
        ("a.csv", b"PK\x03\x04", "spreadsheet"),
        ("a.json", b"PAR1", "format=parquet"),
        ("a.xlsx", b"PK\x03\x04", "does not tell the format"),
        ("a.txt", b"a\nb\0c", "a.txt:2: holds a NUL byte"),
        ("a.txt", b"\xff\xfea", "begins as utf-16"),
        ("a.json", LINES.encode(), "JSON Lines"),
        ("a.json", b'{"x": 1}', "format=jsonl"),
        ("a.jsonl", b'[{"x": 1}]', "one JSON value"),
        ("a.jsonl", b'[\n{"x": 1},\n{"x": 2}\n]', "one JSON value"),
        ("a.jsonl", b'{\n"x": 1\n}', "one JSON value"),
        ("a.jsonl", b'{"x": 1}\n{"x": 1, "x": 2}', "a.jsonl:2: 'x' stands twice"),
        ("a.jsonl", b'{"x": NaN}', "NaN is no JSON"),
        ("a.json", b'[{"x": -Infinity}]', "-Infinity is no JSON"),
        ("a.jsonl", b'{"x": ' + b"9" * 5000 + b"}", "too many digits"),
        ("a.jsonl", b'{"x": ' + b"[" * 100000 + b"}", "nested too deeply"),
        ("a.csv", b",prompt\n0,a\n", "column 1 of the header has no name"),
        ("a.tsv", b"prompt,target\na,b\n", r"separated by '\t'"),
        ("a.csv", b"prompt;target\na;b\n", "separated by ','"),
    ],
    ids=str,
)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in source_refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_may_end_as_on_any_system(tmp_path, name, end):
    lines = {"a.txt": ["a", "b"], "a.jsonl": ['{"text": "a"}', '{"text": "b"}'], "a.csv": ["text", "a", "b"]}
    (tmp_path / name).write_bytes(end.join(lines[name]).encode())
    assert read_rows(tmp_path / name) == [{"text": "a"}, {"text": "b"}]


def test_a_wide_text_with_its_mark_is_read(tmp_path):
    for encoding in ("utf-16", "utf-32"):
        (tmp_path / "a.jsonl").write_text('{"x": "ä"}', encoding=encoding)
        assert read_rows(tmp_path / "a.jsonl") == [{"x": "ä"}]


def test_a_csv_field_may_be_long_and_its_limit_stays(tmp_path):
    import csv

    (tmp_path / "a.csv").write_text("x , y\n" + "a" * 200_000 + ",b\n")
    assert len(read_rows(tmp_path / "a.csv")[0]["x"]) == 200_000
    assert csv.field_size_limit() == 131_072


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read all")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(LINES)
    path.chmod(0)
    assert "Permission denied" in source_refusal(path)


@pytest.mark.parametrize("bits", [16, 32])
def test_a_short_float_keeps_the_digits_that_it_was_written_with(bits, tmp_path):
    frame = pandas.DataFrame({"n": numpy.array([0.1, 2.5], dtype=f"float{bits}")})
    table = pyarrow.table({"n": pyarrow.array(frame["n"].to_numpy())})
    parquet.write_table(table, tmp_path / "a.parquet")
    data = datasets.Dataset(table)
    for source in (frame, table, tmp_path / "a.parquet", data, data.with_format("numpy")):
        assert [row["n"] for row in read_rows(source)] == [0.1, 2.5]


@pytest.mark.parametrize("format", ["pandas", "arrow"])
def test_a_dataset_whose_rows_are_tables_gives_rows(format):
    assert read_rows(datasets.Dataset.from_list(ROWS).with_format(format)) == ROWS
