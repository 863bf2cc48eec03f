"""The trackers: what each library has on disk afterwards, and that none of them can stop a run."""

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from hybrid.core import InputError
from hybrid.run import trackers
from hybrid.run.trackers import make_trackers

CONFIG = {"model": {"name": "gpt2"}, "optimizer": {"lr": 2e-5}, "references": [{"weight": 1.0}]}
ROW = {
    "phase": "eval",
    "index": 3,
    "prompt": "Tell me",
    "response": "<b>a\nlone \ud83d half</b>",
    "reward": 0.5,
    "components": {"sentiment": torch.tensor(0.75), "bleu@4": float("nan")},
}


class Recorder:
    """A tracker that keeps what it is given."""

    calls: list  # of one test

    def __init__(self, *run):
        self.calls.append(("made", *run))

    def log(self, *arguments):
        self.calls.append(("log", *arguments))

    def samples(self, *arguments):
        self.calls.append(("samples", *arguments))

    def close(self, *arguments):
        self.calls.append(("close", *arguments))


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Makes trackers of the given classes, named first, second, ...; the module that they need is `json`."""

    def make(*kinds):
        table = {name: ("json", kind) for name, kind in zip(("first", "second"), kinds, strict=False)}
        monkeypatch.setattr(trackers, "_TRACKERS", table)
        return make_trackers(list(table), folder=tmp_path, run_name="run", config=CONFIG)

    return make


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "calls", [], raising=False)
    return Recorder


def failing(method, error):
    """A recorder whose one method raises."""

    def fail(self, *arguments):
        raise error

    return type("Failing", (Recorder,), {method: fail})


def settled(thread_name):
    """Wait for the tracker's thread to end by itself."""
    for thread in threading.enumerate():
        if thread.name == thread_name:
            thread.join(5)


def test_numbers_are_named_by_phase_and_path(made, recorder):
    run = made(recorder)
    run.log({"reward": torch.tensor(0.5), "parts": {"kl": 2}}, 7, "ppo")
    run.close()
    assert recorder.calls[1:] == [("log", {"ppo/reward": 0.5, "ppo/parts/kl": 2.0}, 7), ("close", "finished")]


@pytest.mark.parametrize("value", [None, float("nan"), torch.tensor(float("inf")), "high", torch.ones(2), 10**400])
def test_what_is_no_finite_number_is_left_out(made, recorder, value):
    run = made(recorder)
    run.log({"reward": value, "kl": 1.0}, 1, "ppo")
    run.log({"reward": value}, 2, "ppo")
    run.close()
    assert recorder.calls[1:-1] == [("log", {"ppo/kl": 1.0}, 1)]


def test_samples_become_a_table_with_a_column_for_each_component(made, recorder):
    run = made(recorder)
    run.samples(iter([ROW, {"prompt": "Why?", "reward": None}]), 4)
    run.close()
    _, name, table, step = recorder.calls[1]
    assert (name, step) == ("eval/samples", 4)
    assert table.columns == ["index", "prompt", "response", "reward", "components/sentiment", "components/bleu@4"]
    assert table.rows == [[3, "Tell me", "<b>a\nlone ? half</b>", 0.5, 0.75, None], [1, "Why?", None, None, None, None]]


def test_no_trackers_do_nothing(tmp_path):
    run = make_trackers([], folder=None, run_name="run", config={})
    run.log({"loss": 1.0}, 1, "sft")
    run.samples([], 1)
    run.close()


def test_unknown_tracker_is_refused_with_the_nearest_one(tmp_path):
    with pytest.raises(InputError, match="unknown tracker 'wandbb'; did you mean 'wandb'"):
        make_trackers(["wandbb"], folder=tmp_path, run_name="run", config={})


def test_tracker_without_a_folder_is_refused():
    with pytest.raises(InputError, match=r"run\.output"):
        make_trackers(["tensorboard"], folder=None, run_name="run", config={})


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_library_that_is_not_installed_is_named_with_the_way_to_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, trackers._TRACKERS[name][0], None)
    with pytest.raises(InputError, match=rf"{name}.*pip install 'hybrid-trainer\[track\]'"):
        make_trackers([name], folder=tmp_path, run_name="run", config={})


@pytest.mark.parametrize("method", ["__init__", "log", "samples", "close"])
def test_failing_tracker_warns_once_and_the_others_go_on(made, recorder, method):
    run = made(failing(method, OSError("no\nroute")), recorder)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step in (1, 2):
            run.log({"loss": 1.0}, step, "sft")
            run.samples([ROW], step)
        run.close()
    assert [str(w.message) for w in warned] == ["tracker 'first' is left out from here on: OSError: no"]
    assert [call for call in recorder.calls if call[0] == "close"] == [("close", "finished")]


def test_failed_tracker_is_called_no_more(made, recorder):
    run = made(failing("log", OSError("down")))
    run.log({"loss": 1.0}, 1, "sft")
    settled("tracker-first")
    with pytest.warns(UserWarning, match="down"):
        run.samples([ROW], 1)
    run.close()
    assert [call[0] for call in recorder.calls] == ["made"]


def test_library_that_exits_the_process_does_not(made, recorder):
    run = made(failing("__init__", SystemExit("login needed")))
    settled("tracker-first")
    with pytest.warns(UserWarning, match="SystemExit: login needed"):
        run.log({"loss": 1.0}, 1, "sft")


def test_keyboard_interrupt_passes(made, recorder):
    run = made(failing("log", KeyboardInterrupt()))
    run.log({"loss": 1.0}, 1, "sft")
    settled("tracker-first")
    with pytest.raises(KeyboardInterrupt):
        run.log({"loss": 1.0}, 2, "sft")


def test_tracker_that_hangs_costs_the_run_nothing_but_the_wait_at_the_end(made, recorder, monkeypatch):
    class Hanging(Recorder):
        def __init__(self, *run):
            time.sleep(5)

    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.1)
    began = time.monotonic()
    run = made(Hanging, recorder)
    run.log({"loss": 1.0}, 1, "sft")
    with pytest.warns(UserWarning, match="'first' is left out.*not done 0.1 seconds after"):
        run.close()
    assert time.monotonic() - began < 1
    assert recorder.calls[-1] == ("close", "finished")


def test_tracker_that_falls_behind_is_dropped(made, recorder, monkeypatch):
    class Slow(Recorder):
        def log(self, *arguments):
            time.sleep(5)

    monkeypatch.setattr(trackers, "MAX_WAITING", 3)
    run = made(Slow)
    with pytest.warns(UserWarning, match="3 calls behind"):
        for step in range(6):
            run.log({"loss": 1.0}, step, "sft")
    run.close()


def test_second_close_does_nothing(made, recorder):
    run = made(recorder)
    run.close("stopped")
    run.close("failed")
    assert [call for call in recorder.calls if call[0] == "close"] == [("close", "stopped")]


def tracked(name, folder, **env):
    """A small run with the real library, offline and in a process of its own."""
    folder.mkdir(exist_ok=True)
    row = ROW | {"components": {"sentiment": 0.75}}
    code = (
        "import sys; from hybrid.run.trackers import make_trackers\n"
        f"run = make_trackers([sys.argv[1]], folder=sys.argv[2], run_name='tiny', config={CONFIG})\n"
        "run.log({'reward': 0.25, 'bleu@4': 0.5, 'parts': {'kl': 2}, 'nan': float('nan')}, 3, 'ppo')\n"
        f"run.log({{'reward': 0.75}}, 3, 'eval'); run.samples([{row}], 3); run.close('finished')"
    )
    offline = {"WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true"}
    offline["TRACKIO_DIR"] = str(folder / "trackio-files")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:__main__", "-c", code, name, str(folder)],
        env={name: value for name, value in {**os.environ, **offline, **env}.items() if value is not None},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def wandb_records(path):
    """The records of a .wandb file: a LevelDB log (7 bytes of header; crc, length, type before each) of protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at = path.read_bytes(), 7
    while at + 7 < len(data):
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        assert data[at + 6] == 1, "a record that is whole"
        yield Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length


@pytest.mark.slow
def test_tensorboard_has_the_scalars_and_the_samples_as_plain_text(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"ppo/reward", "ppo/bleu@4", "ppo/parts/kl", "eval/reward"}
    (reward,) = events.Scalars("eval/reward")
    assert (reward.step, reward.value) == (3, 0.75)
    text = events.Tensors("eval/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "response\n\n    <b>a\n    lone ? half</b>" in text


@pytest.mark.slow
def test_wandb_has_numbers_config_and_table_under_the_run_folder(tmp_path):
    pytest.importorskip("wandb")
    tracked("wandb", tmp_path)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    records = list(wandb_records(file))
    history = {".".join(i.nested_key) or i.key: i.value_json for r in records for i in r.history.item}
    assert [float(history[name]) for name in ("eval/reward", "ppo/parts/kl", "_step")] == [0.75, 2, 3]
    assert "ppo/nan" not in history
    config = {update.key: update.value_json for r in records for update in r.run.config.update}
    assert json.loads(config["model"]) == {"name": "gpt2"}
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/**/*.table.json")
    assert '"Tell me"' in table.read_text()


@pytest.mark.slow
def test_wandb_without_a_key_stays_offline_and_asks_nothing(tmp_path):
    pytest.importorskip("wandb")
    tracked("wandb", tmp_path, WANDB_MODE=None, WANDB_API_KEY=None, HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 1


@pytest.mark.slow
def test_resumed_run_goes_on_with_the_same_wandb_run(tmp_path):
    pytest.importorskip("wandb")
    tracked("wandb", tmp_path)
    run_id = (tmp_path / "wandb" / "run-id.txt").read_text()
    tracked("wandb", tmp_path)
    assert {file.stem for file in (tmp_path / "wandb").glob("offline-run-*/*.wandb")} == {f"run-{run_id}"}


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_mlflow_has_one_run_with_numbers_params_and_table_under_the_run_folder(tmp_path, times):
    mlflow = pytest.importorskip("mlflow")
    for _ in range(times):
        tracked("mlflow", tmp_path)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("hybrid-trainer").experiment_id])
    assert run.info.run_name == "tiny"
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"ppo/reward": 0.25, "ppo/bleu_4": 0.5, "ppo/parts/kl": 2.0, "eval/reward": 0.75}
    assert run.data.params["optimizer.lr"] == "2e-05"
    (table,) = (tmp_path / "mlflow" / "artifacts").glob("**/eval/samples/step-000003.json")
    assert '"Tell me"' in table.read_text()


@pytest.mark.slow
def test_mlflow_goes_where_the_environment_says(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    tracked("mlflow", tmp_path / "run", MLFLOW_TRACKING_URI=uri, MLFLOW_EXPERIMENT_NAME="mine")
    assert mlflow.MlflowClient(tracking_uri=uri).get_experiment_by_name("mine") is not None


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_trackio_has_one_run_with_the_numbers_and_the_table(tmp_path, times):
    pytest.importorskip("trackio")
    for _ in range(times):
        tracked("trackio", tmp_path)
    code = (
        "from trackio.sqlite_storage import SQLiteStorage as S; import json\n"
        "print(json.dumps(S.get_logs('hybrid-trainer', 'tiny'), default=str))"
    )
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio-files")}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert shown.count('"ppo/reward": 0.25') == times
    assert '"eval/reward": 0.75' in shown
    assert "Tell me" in shown


@pytest.mark.slow
def test_server_that_is_not_there_does_not_stop_the_run(tmp_path):
    pytest.importorskip("mlflow")
    code = (
        "import sys; from hybrid.run import trackers; trackers.CLOSE_SECONDS = 0.5\n"
        "run = trackers.make_trackers(['mlflow'], folder=sys.argv[1], run_name='tiny', config={})\n"
        "run.log({'reward': 0.25}, 3, 'ppo'); run.close(); print('the run went on')"
    )
    env = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the run went on" in done.stdout
    assert "tracker 'mlflow' is left out" in done.stderr
