"""The run log: what is on disk, when, and what the console shows."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from hybrid.core import InputError
from hybrid.run import RunLog, open_run_folder, read_jsonl


def logged(folder, *rows):
    with RunLog(folder, total_steps=None, live=False) as log:
        for row in rows:
            log.step(row)
    return (folder / "metrics.jsonl").read_text("utf-8")


def shown(capsys, total_steps, *rows):
    with RunLog(None, total_steps=total_steps) as log:
        for row in rows:
            log.step(row, {"sft_loss": "loss"} if row["phase"] == "sft" else {})
    return capsys.readouterr().out


@pytest.mark.parametrize("number", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
def test_number_that_is_not_finite_becomes_null(tmp_path, number):
    assert logged(tmp_path, {"step": 1, "loss": number}) == '{"step": 1, "loss": null}\n'


def test_tensors_are_written_as_numbers(tmp_path):
    row = {"step": torch.tensor(1), "loss": torch.tensor(0.5), "parts": {"kl": torch.tensor([2.0])}}
    assert json.loads(logged(tmp_path, row)) == {"step": 1, "loss": 0.5, "parts": {"kl": 2.0}}


def test_row_can_be_read_while_the_log_is_open(tmp_path):
    with RunLog(tmp_path, total_steps=None, live=False) as log:
        log.step({"step": 1, "phase": "sft"})
        assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "phase": "sft"}]


@pytest.mark.slow
def test_killed_process_has_lost_no_row(tmp_path):
    code = (
        "import os, sys; from hybrid.run import RunLog\n"
        "log = RunLog(sys.argv[1], total_steps=None, live=False).__enter__()\n"
        "for step in range(3): log.step({'step': step}); log.samples([{'index': step}])\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert [row["index"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [0, 1, 2]


def test_continued_run_drops_the_half_line_of_a_crash(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert logged(tmp_path, {"step": 2}) == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("text", ["two\nlines", "🎉 שלום", "a\u2028b", "lone \ud83d half", "\x00\x1b[0m", ""])
def test_any_text_comes_back_as_it_was(tmp_path, text):
    with RunLog(tmp_path, total_steps=None, live=False) as log:
        log.samples([{"response": text}])
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"response": text}]


def test_log_without_a_folder_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None, total_steps=1, live=False) as log:
        log.step({"step": 1, "phase": "sft"})
        log.samples([{"response": "x"}])
    assert not list(tmp_path.iterdir())


def test_silent_log_prints_nothing(tmp_path, capsys):
    logged(tmp_path, {"step": 1, "phase": "sft"})
    assert capsys.readouterr().out == ""


def test_console_shows_the_last_number_seen_of_each_phase(capsys):
    rows = {"step": 1, "phase": "sft", "loss": 3.25}, {"step": 2, "phase": "ppo", "reward": 0.5, "kl": 4.0}
    last = shown(capsys, 2, *rows).splitlines()[-1]
    assert last == "ppo  step 2/2  eta 0:00  reward 0.5  kl 4  sft_loss 3.25"


def test_console_shows_each_loss_that_it_is_told_of(capsys):
    row = {"step": 1, "phase": "joint", "kl": 4.0, "own_loss": 2.5, "sft_loss": 1.5, "kl_loss": 9.0}
    with RunLog(None, total_steps=1) as log:
        log.step(row, {"own_loss": "own_loss", "sft_loss": "sft_loss", "gone_loss": "gone_loss"})
    assert capsys.readouterr().out == "joint step 1/1  eta 0:00  kl 4  sft_loss 1.5  own_loss 2.5\n"


def test_console_shows_the_accuracy_of_a_step_on_preferences(capsys):
    with RunLog(None, total_steps=6) as log:
        row = {"step": 6, "phase": "dpo", "loss": 0.017, "accuracy": 0.9375, "margin_mean": 1.0}
        log.step(row, {"dpo_loss": "loss"})
    assert capsys.readouterr().out == "dpo  step 6/6  eta 0:00  dpo_loss 0.017  accuracy 0.9375\n"


def test_console_shows_the_measures_of_objectives_at_an_evaluation(capsys):
    measures = {"dpo/loss": 0.5, "dpo/accuracy": 0.9375, "dpo/accuracy_sem": 0.1, "dpo/num_pairs": 16.0}
    row = {"step": 6, "phase": "eval", "sft_loss": 2.0, **measures, "reward_model/ece": 0.25}
    line = "eval step 6/6  sft_loss 2  dpo/loss 0.5  dpo/accuracy 0.9375  reward_model/ece 0.25\n"
    assert shown(capsys, 6, row) == line


def test_redirected_console_gets_about_twenty_lines(capsys):
    rows = [{"step": step, "phase": "sft", "loss": 1.0} for step in range(1, 401)]
    assert len(shown(capsys, 400, *rows).splitlines()) == 20


def test_redirected_console_gets_every_evaluation(capsys):
    rows = [{"step": step, "phase": "eval", "reward": 0.1} for step in (0, 7, 13)]
    assert len(shown(capsys, 400, *rows).splitlines()) == 3


def test_redirected_console_gets_no_control_characters(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = shown(capsys, 1, {"step": 1, "phase": "sft", "loss": float("nan")}, {"step": 1, "phase": "eval"})
    assert out.replace("\n", "").isprintable()


def test_terminal_gets_one_line_that_moves(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with RunLog(None, total_steps=9) as log:
        log.step({"step": 9, "phase": "ppo", "reward": 0.5})
    assert "ppo  step 9/9" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()


def test_new_run_folder_is_created_with_its_parents(tmp_path):
    assert open_run_folder(tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_folder_that_holds_a_run_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=f"already holds a run .{name}.*name another"):
        open_run_folder(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
@pytest.mark.parametrize("name", ["report.html", "samples.jsonl", "export/README.md", "checkpoints/notes.txt"])
def test_folder_with_a_file_that_a_run_would_overwrite_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds '{name.partition('/')[0]}', which a run would overwrite"):
        open_run_folder(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_folder_of_other_files_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    assert open_run_folder(tmp_path) == tmp_path


def test_folder_that_even_root_cannot_create_is_refused():
    with pytest.raises(InputError, match="cannot write to the output folder '/proc/run'"):
        open_run_folder("/proc/run")


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Not a directory"):
        open_run_folder(tmp_path / "file" / "run")


def test_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        open_run_folder(tmp_path / "file")


def test_cut_off_last_line_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": 1}\n{"b": "é"}'.encode()[:-3])
    assert read_jsonl(path) == [{"a": 1}]


@pytest.mark.parametrize("line", ["{", "", "3"])
def test_broken_line_that_is_not_cut_off_is_refused_by_number(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(InputError, match="line 2"):
        read_jsonl(path)


def test_rows_after_those_that_a_checkpoint_counted_are_left_out(tmp_path):
    with RunLog(tmp_path, total_steps=None, live=False) as log:
        for step in (1, 2, 3):
            log.step({"step": step, "phase": "sft"})
            log.samples([{"step": step, "phase": "ppo", "response": "a\ud800"}])
            if step == 2:
                sizes = log.sizes()
    with RunLog(tmp_path, total_steps=None, live=False, kept=sizes) as log:
        assert log.sizes() == sizes
        log.step({"step": 3, "phase": "ppo"})
    assert [row["phase"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == ["sft", "sft", "ppo"]
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [1, 2]


def test_a_second_log_of_one_folder_is_refused(tmp_path):
    with (
        RunLog(tmp_path, total_steps=None, live=False),
        pytest.raises(InputError, match="another run is writing to the folder"),
        RunLog(tmp_path, total_steps=None, live=False),
    ):
        pass
    with RunLog(tmp_path, total_steps=None, live=False):
        pass


def test_rows_that_were_lost_after_they_were_counted_stay_lost(tmp_path):
    with RunLog(tmp_path, total_steps=None, live=False) as log:
        log.step({"step": 1, "phase": "sft"})
    with RunLog(tmp_path, total_steps=None, live=False, kept={"metrics.jsonl": 1000}) as log:
        log.step({"step": 2, "phase": "sft"})
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_new_log_of_a_folder_that_has_got_a_run_meanwhile_is_refused(tmp_path, name):
    log = RunLog(tmp_path, total_steps=None, live=False, new=True)
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(InputError, match="already holds a run"), log:
        pass


class Recorder:
    """Trackers that keep what they are given."""

    def __init__(self):
        self.calls = []

    def log(self, metrics, step, phase):
        self.calls.append(("log", metrics, step, phase))

    def samples(self, rows, step):
        self.calls.append(("samples", [row["response"] for row in rows], step))

    def close(self, status):
        self.calls.append(("close", status))


def test_trackers_get_numbers_and_the_samples_of_evaluations():
    trackers = Recorder()
    with RunLog(None, total_steps=None, live=False, trackers=trackers) as log:
        log.step({"step": 3, "phase": "ppo", "cycle": 1, "reward": 0.5})
        log.samples([{"step": 3, "phase": "ppo", "response": "a"}])
        log.samples([{"step": 3, "phase": "eval", "response": "b"}])
    assert trackers.calls == [("log", {"reward": 0.5}, 3, "ppo"), ("samples", ["b"], 3), ("close", "finished")]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "stopped"), (ValueError, "failed")])
def test_trackers_are_told_how_a_run_ended(error, status):
    trackers = Recorder()
    with pytest.raises(error), RunLog(None, total_steps=None, live=False, trackers=trackers):
        raise error
    assert trackers.calls == [("close", status)]


def test_an_output_of_a_user_that_there_is_not_is_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_run_folder("~nobody-of-that-name/run").is_dir()
