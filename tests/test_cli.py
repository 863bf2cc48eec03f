"""The command line as a user types it: what it does, and bad input as one line and status 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid.cli import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(tmp_path, stories):
    """A config file of a tiny run on real weights; returns (path, what is in it)."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Tell me about day {i}.", "target": f"It was a good day, number {i}."} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"name": stories},
        "data": {"train": str(data), "eval_fraction": 0.25},
        "reward": {"type": "sentiment_lexicon"},
        "sampling": {"max_new_tokens": 8},
        "mixing": {"cycles": 1, "sft_steps_per_cycle": 1},
        "sft": {"batch_size": 2},
        "ppo": {"batch_size": 4, "minibatch_size": 2, "epochs": 1},
        "eval": {"num_prompts": 3},
        "run": {"output": str(tmp_path / "run")},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("module", ["hybrid", "hybrid.cli"])
def test_both_modules_are_the_command(module):
    done = subprocess.run([sys.executable, "-m", module, "schedulers"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cosine" in done.stdout


def test_what_deepspeeds_launcher_puts_first_is_taken(capsys):
    assert main(["--local_rank=1", "schedulers"]) == 0
    assert "local_rank" not in capsys.readouterr().out


def test_train_evaluates_trains_exports_and_reports(config, tmp_path, capsys):
    assert main(["train", str(config)]) == 0
    run = tmp_path / "run"
    names = {"config.yaml", "metrics.jsonl", "samples.jsonl", "report.html", "export", "checkpoints", "finished.json"}
    assert {p.name for p in run.iterdir()} == names
    printed = capsys.readouterr().out
    assert "reward" in printed
    assert "report.html" in printed


def test_a_finished_run_can_be_evaluated_asked_and_reported(config, tmp_path, capsys):
    main(["train", str(config)])
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    measures = dict(line.split() for line in capsys.readouterr().out.splitlines() if line)
    # The same draws from the exported weights, against the model the run started from.
    assert float(measures["reward"]) == pytest.approx(last["reward"], abs=1e-4)
    assert float(measures["kl"]) == pytest.approx(last["kl"], abs=1e-3)
    assert main(["generate", str(tmp_path / "run"), "Tell me about Lily."]) == 0
    assert "Tell me about Lily." in capsys.readouterr().out
    (tmp_path / "data.jsonl").unlink()
    assert main(["generate", str(tmp_path / "run"), "And now?"]) == 0, "the data is not needed"
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_two_runs_are_compared_on_one_page(config, tmp_path, capsys):
    runs = [tmp_path / name for name in ("one", "two")]
    for run, lr in zip(runs, ("1e-5", "1e-3"), strict=True):
        assert main(["train", str(config), f"run.output={run}", f"optimizer.lr={lr}"]) == 0
    page = tmp_path / "comparison.html"
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    assert "one" in capsys.readouterr().out
    assert "optimizer.lr" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["optimizers", "schedulers"])
def test_the_table_of_the_docs_is_what_the_command_prints(kind, capsys):
    assert main([kind, "--markdown"]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "optimizers.md").read_text()
    assert main([kind]) == 0
    assert ("adamw_8bit" if kind == "optimizers" else "reduce_on_plateau") in capsys.readouterr().out


def test_generate_takes_any_model_and_may_be_greedy(stories, capsys):
    greedy = ["--set", "data.template=none", "--set", "sampling.temperature=0"]
    for _ in range(2):
        assert main(["generate", stories, "Once upon a time", *greedy]) == 0
    first, second = capsys.readouterr().out.split("Once upon a time")[1:]
    assert first == second


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.epoch=3"], "did you mean 'ppo.epochs'"),
        (["ppo.epochs=many"], "ppo.epochs"),
        (["ppo.epochs="], "ppo.epochs is empty"),
        (["ppo={epochs: 1, epochs: 2}"], "stands twice"),
        (["run.output=a\0b"], "unacceptable character #x0000"),
        (["optimizer.lr=-1"], "optimizer.lr must be > 0"),
        (["sft.batch_size=0"], "SFTConfig.batch_size"),
        (["ppo.minibatch_size=8"], "minibatch_size must be at most batch_size"),
        (["data.train=missing.jsonl"], "missing.jsonl"),
        (["data.prompt=promt", "data.target=target"], "promt"),
        (["sampling.max_new_tokens=600"], "leaves no room"),
        (["model.name=no/such/folder"], "not found"),
        (["model.name=null"], "model.name is missing"),
        (["data.train=null"], "data.train is missing"),
        (["reward=null"], "reward is missing"),
        (["sampling.temperature=0"], "sampling.temperature must be > 0"),
        (["run.output=/proc/nowhere"], "cannot write"),
        (["run.trackers=[wand]"], "unknown tracker 'wand'; did you mean 'wandb'"),
        (["reward={type: sentimental_lexicon}"], "did you mean 'sentiment_lexicon'"),
        (["reward={type: length_window, mim: 3}"], "did you mean 'min'"),
    ],
)
def test_bad_input_is_one_line_and_status_2_before_a_model_loads(config, overrides, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("hybrid.models.Policy.from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    assert main(["train", str(config), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "target": "b"}\n{"prompt": "c", "target": \n', "data.jsonl:2"),
        ("", "no rows"),
        ('{"question": "a", "target": "b"}\n', "question"),
    ],
)
def test_bad_data_is_one_line_and_status_2(config, tmp_path, text, message, capsys):
    (tmp_path / "data.jsonl").write_text(text)
    assert main(["train", str(config)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_that_holds_a_run_is_refused(config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert main(["train", str(config)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_the_data_is_looked_at_before_the_model_is_looked_for(config, capsys, monkeypatch):
    monkeypatch.setattr("hybrid.setup.model_context", lambda _: pytest.fail("the model was looked for"))
    monkeypatch.setattr("hybrid.learner.model_context", lambda _: pytest.fail("the model was looked for"))
    assert main(["train", str(config), "model.name=no-such-model", "data.train=missing.jsonl"]) == 2
    assert "missing.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["report"], ["eval"]])
def test_a_folder_without_a_run_is_refused(command, tmp_path, capsys):
    assert main([*command, str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_python_m_hybrid_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "hybrid", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "demo" in done.stdout


def test_an_edit_of_a_finished_run_is_refused(tmp_path, capsys):
    (tmp_path / "finished.json").write_text('{"step": 3}')
    assert main(["train", "--resume", str(tmp_path), "optimizer.lr=1"]) == 2
    assert "is finished after step 3: nothing is left that optimizer.lr=1 could change" in capsys.readouterr().err
