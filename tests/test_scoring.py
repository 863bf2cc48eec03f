"""A file of responses through a reward: columns, tables, files."""

import csv
import json
import math
from datetime import datetime

import pytest

from hybrid.cli import main
from hybrid.core import InputError
from hybrid.rewards import make_reward
from hybrid.scoring import score_rows, scored_rows, write_rows

ROWS = [{"response": "a b", "target": "a", "id": 7}, {"response": None, "id": 8}, {"response": "é 日本", "id": 9}]
SPEC = {
    "type": "weighted_sum",
    "components": [{"type": "length_window", "min": 4, "max": 9, "weight": 3}, {"type": "sentiment_lexicon"}],
}


def test_the_row_is_the_item():
    reward = make_reward({"type": "python", "function": lambda response, item: item["id"]})
    assert score_rows(reward, ROWS) == [7, 8, 9]


def test_columns_may_have_other_names():
    rows = [{"answer": "a b", "question": "q"}]
    reward = make_reward(lambda response, prompt, target: len(response + prompt + target))
    assert score_rows(reward, rows, {"response": "answer", "prompt": "question", "target": "target"}) == [4]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"response": "respond"}, "unknown column 'respond'; did you mean 'response'"),
        ({"target": "gold"}, "unknown column 'gold'; known: id, response, target"),
    ],
)
def test_a_column_that_is_not_there_is_refused(columns, message):
    standard = {"response": "response", "target": "target", "prompt": "prompt"}
    with pytest.raises(InputError, match=message):
        score_rows(make_reward({"type": "vader"}), ROWS, {**standard, **columns})


def test_a_cell_that_is_no_text_is_refused():
    with pytest.raises(InputError, match=r"responses\[0\] must be a text or None, got 3"):
        score_rows(make_reward({"type": "vader"}), [{"response": 3}])


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_scored_rows_are_written_whole(tmp_path, suffix):
    file = tmp_path / "new" / f"scores.{suffix}"
    write_rows(file, scored_rows(ROWS, score_rows(make_reward(SPEC), ROWS)))
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream)) if suffix == "csv" else [json.loads(line) for line in stream]
    assert [float(row["reward"]) for row in rows] == [0.375, 0.0, 0.375]
    assert [float(row["reward/length_window"]) for row in rows] == [0.5, 0.0, 0.5]
    assert rows[2]["response"] == "é 日本"


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_half_a_character_can_be_written(tmp_path, suffix):
    write_rows(tmp_path / f"scores.{suffix}", [{"response": "a\ud800"}])
    assert "a\\ud800" in (tmp_path / f"scores.{suffix}").read_text(encoding="utf-8")


def test_what_a_terminal_would_obey_is_not_shown(tmp_path, capsys):
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps({"response": "a\x1b[31m\ud800 b"}) + "\n")
    assert main(["reward", '{"type": "vader"}', str(file)]) == 0
    assert "a\ufffd[31m\ufffd b" in capsys.readouterr().out


def test_a_row_without_a_score_has_none():
    reward = make_reward(
        {"type": "python", "function": lambda response: {"a b": 1.0}.get(response), "on_error": "skip"}
    )
    rows = scored_rows(ROWS, score_rows(reward, ROWS))
    assert [row["reward"] for row in rows] == [1.0, None, None]


@pytest.fixture
def responses(tmp_path):
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


def test_the_command_shows_scores_and_components(responses, tmp_path, capsys):
    spec = tmp_path / "reward.json"
    spec.write_text(json.dumps({"REWARD": SPEC}))
    output = tmp_path / "scores.jsonl"
    assert main(["reward", str(spec), str(responses), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "a b" in printed and "0.375" in printed and "sentiment_lexicon" in printed.replace("\n", "")
    assert json.loads(output.read_text().splitlines()[0])["reward"] == 0.375


def test_the_spec_may_be_written_out(responses, capsys):
    assert main(["reward", json.dumps(SPEC), str(responses)]) == 0
    assert "0.375" in capsys.readouterr().out


def test_the_command_lists_the_types_and_prints_the_schema(capsys):
    assert main(["reward", "--list"]) == 0
    assert "sentiment_lexicon" in capsys.readouterr().out
    assert main(["reward", "--schema"]) == 0
    assert "$defs" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "reward takes a SPEC and a FILE, or --list, or --schema"),
        (['{"type": "vadr"}', "FILE"], "REWARD.type: unknown reward 'vadr'; did you mean 'vader'"),
        (["{type}", "FILE"], "is not JSON"),
        (['{"type": "vader"}', "FILE", "--output", "x.txt"], "output must be a .jsonl or .csv file, got 'x.txt'"),
        (['{"type": "vader"}', "FILE", "--response", "answer"], "unknown column 'answer'"),
        (['{"type": "vader"}', "nowhere.jsonl"], "nowhere.jsonl"),
        (['{"type": "vader"}', "FILE", "--rows", "-1"], "--rows must be at least 0, got -1"),
        (['{"type": "vader"}', "FILE", "--output", "/proc/scores.csv"], "cannot write '/proc/scores.csv'"),
        (['{"type": "vader"}', "FILE", "--output", "a" * 300 + ".csv"], "aaa.csv'"),
        (['{"type": "vader", "type": "bleu"}', "FILE"], "'type' stands twice in one object"),
    ],
)
def test_bad_input_is_one_line_and_status_2(responses, arguments, message, capsys):
    assert main(["reward", *(str(responses) if a == "FILE" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_reward_that_fails_shows_the_sample_and_its_traceback(responses, capsys):
    assert main(["reward", '{"type": "python", "function": "test_scoring:broken"}', str(responses)]) == 1
    error = capsys.readouterr().err
    assert "reward 'python' failed on response 'a b': KeyError: 'missing'" in error
    assert "def broken" in error or 'raise KeyError("missing")' in error


def broken(response):
    raise KeyError("missing")


@pytest.mark.parametrize("output", ["responses.jsonl", "other.csv", "link.jsonl", "folder.jsonl", "dangling.csv"])
def test_nothing_that_is_there_is_overwritten(responses, output, capsys):
    folder = responses.parent
    (folder / "other.csv").write_text("mine")
    (folder / "link.jsonl").symlink_to(responses)
    (folder / "dangling.csv").symlink_to(folder / "nowhere")
    (folder / "folder.jsonl").mkdir()
    before = responses.read_bytes()
    assert main(["reward", '{"type": "vader"}', str(responses), "--output", str(folder / output)]) == 2
    error = capsys.readouterr().err
    assert "is there already, and nothing is overwritten" in error and error.count("\n") == 1
    assert responses.read_bytes() == before and (folder / "other.csv").read_text() == "mine"


@pytest.mark.parametrize("column", ["reward", "reward/vader"])
def test_a_column_of_the_users_is_not_overwritten(tmp_path, column, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"response": "a", column: 5}) + "\n")
    arguments = ["reward", '{"type": "vader"}', str(tmp_path / "rows.jsonl")]
    assert main([*arguments, "--output", str(tmp_path / "scored.jsonl")]) == 2
    error = capsys.readouterr().err
    assert f"column {column!r} is there already" in error and error.count("\n") == 1
    assert not (tmp_path / "scored.jsonl").exists()
    assert main(arguments) == 0


FORMULAS = [
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\uff1d1",
    "'=1",
    "''@x",
    "-",
    "-a",
    "=1",
]
TEXTS = ["-5", "+1.5e-3", "-.5", "5", "'quoted'", "a=b", "", " =1 is no formula after a space", "日本"]


def test_a_csv_holds_nothing_that_a_spreadsheet_would_run(tmp_path):
    texts = [*FORMULAS, *TEXTS]
    write_rows(tmp_path / "scored.csv", [{"response": text, "=evil": -1.5, "-2+3": None} for text in texts])
    with (tmp_path / "scored.csv").open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["response", "'=evil", "'-2+3"]
    assert [row[0] for row in rows] == [*("'" + text for text in FORMULAS), *TEXTS]
    assert {(row[1], row[2]) for row in rows} == {("-1.5", "")}


def test_jsonl_keeps_every_text_as_it_is(tmp_path):
    write_rows(tmp_path / "scored.jsonl", [{"response": text} for text in FORMULAS])
    lines = (tmp_path / "scored.jsonl").read_text().splitlines()
    assert [json.loads(line)["response"] for line in lines] == FORMULAS


def test_what_json_has_not_is_written_as_text(tmp_path):
    row = {"when": datetime(2020, 1, 2), "raw": b"x", "far": [math.inf], "n": 1.5, "none": None}
    write_rows(tmp_path / "scored.jsonl", [row])
    wanted = {"when": "2020-01-02 00:00:00", "raw": "b'x'", "far": ["inf"], "n": 1.5, "none": None}
    assert json.loads((tmp_path / "scored.jsonl").read_text()) == wanted
