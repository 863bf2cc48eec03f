"""A run whose folder is not as it was left: edited, finished, without a checkpoint, on other data."""

import json
from dataclasses import replace

import pytest
from whole_run import crash

from hybrid import HybridConfig, HybridTrainer
from hybrid.cli import main
from hybrid.core import InputError
from hybrid.edits import MAY_CHANGE, check_edits
from hybrid.run import CHECKPOINTS, read_jsonl


def values(stories, tmp_path, **sections):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Tell me about day {i}.", "target": f"It was good, number {i}."} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"name": stories},
        "data": {"train": str(data)},
        "mixing": {"strategy": "sequential", "sft_steps": 4, "ppo_steps": 0},
        "sft": {"batch_size": 2},
        "checkpoint": {"every": 2},
        "run": {"output": str(tmp_path / "run")},
    } | sections


def stopped(config, *, after):
    """The folder of a run that died after some steps."""
    trainer = HybridTrainer(config=HybridConfig.from_dict(config))
    crash(trainer, after + 1)
    return trainer.folder


def edit(folder, *overrides):
    path = folder / "config.yaml"
    HybridConfig.from_file(path, overrides).save(path)


@pytest.fixture
def run(stories, tmp_path):
    """A run of 4 steps that died in its third, with a checkpoint of its second."""
    return stopped(values(stories, tmp_path), after=2)


def test_edits_that_change_what_is_learnt_are_refused_all_at_once(run):
    edit(run, "optimizer.lr=0.1", "optimizer.name=adam", "mixing.sft_steps=9", "sft.batch_size=4", "run.seed=7")
    with pytest.raises(InputError, match=r"cannot change .*model\.name=.*step-2/model") as caught:
        HybridTrainer.resume(run)
    said = str(caught.value)
    assert "\n" not in said
    for change in ("optimizer.lr None → 0.1", "mixing.sft_steps 4 → 9", "sft.batch_size 2 → 4", "run.seed 0 → 7"):
        assert change in said


def test_edits_of_what_is_shown_and_saved_are_taken_said_and_recorded(run, caplog):
    edit(run, "checkpoint.every=1", "checkpoint.keep_last=9")
    HybridTrainer.resume(run).train()
    assert sorted(path.name for path in (run / CHECKPOINTS).iterdir()) == ["step-2", "step-3", "step-4"]
    assert "step-2 with a change: checkpoint.every 2 → 1" in caplog.text
    assert HybridConfig.from_file(run / "config.yaml").checkpoint.every == 1


def test_the_command_line_takes_the_same_edits(run, capsys):
    assert main(["train", "--resume", str(run), "sft.batch_size=4"]) == 2
    assert "sft.batch_size 2 → 4" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "checkpoint.every=1"]) == 0
    assert (run / CHECKPOINTS / "step-3").is_dir()


def test_a_run_that_nobody_edited_says_nothing(run, caplog):
    assert HybridTrainer.resume(run).num_steps == 2
    assert caplog.text == ""


def test_a_folder_that_was_moved_goes_on(run, tmp_path, caplog):
    moved = run.rename(tmp_path / "moved")
    edit(moved, f"run.output={moved}")
    HybridTrainer.resume(moved).train()
    assert caplog.text == ""


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_every_name_that_may_change_is_one(name):
    config = HybridConfig().written()
    for part in name.split("."):
        assert part in config
        config = config[part]


def test_other_data_under_the_same_name_are_refused(run, tmp_path):
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "And now?", "target": "More."}) + "\n")
    with pytest.raises(InputError, match=r"the train data are not those .*\(8 examples, \w+; now 9 examples, \w+\)"):
        HybridTrainer.resume(run)


def test_rows_in_another_order_are_other_data(run, tmp_path):
    lines = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(InputError, match="the train data are not those"):
        HybridTrainer.resume(run)


def test_a_finished_run_is_not_trained_again(stories, tmp_path, capsys):
    config = HybridConfig.from_dict(values(stories, tmp_path, checkpoint={"every": 0}))
    HybridTrainer(config=config).train()
    run, before = tmp_path / "run", (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"finished after step 4, nothing is left of it; its model is in .*export"):
        HybridTrainer.resume(run)
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 0
    assert "is finished after step 4: nothing is left of it" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_that_goes_on_after_its_end_is_not_finished_meanwhile(stories, tmp_path):
    trainer = HybridTrainer(config=HybridConfig.from_dict(values(stories, tmp_path)))
    trainer.train()
    assert (trainer.folder / "finished.json").exists()
    crash(trainer, 5)
    assert not (trainer.folder / "finished.json").exists()


def test_a_killed_run_without_a_checkpoint_says_that_it_starts_again(stories, tmp_path, caplog):
    run = stopped(values(stories, tmp_path, checkpoint={"every": 0}), after=2)
    HybridTrainer.resume(run).train()
    assert "has saved no checkpoint: it starts again from step 0" in caplog.text
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_length_of_a_resumed_run_is_its_own(run):
    with pytest.raises(InputError, match="takes the steps that it had left"):
        HybridTrainer.resume(run).train(epochs=3)


def test_a_checkpoint_of_a_newer_version_is_refused_and_stays(run, monkeypatch):
    monkeypatch.setattr("hybrid.run.checkpoints.FORMAT", 0)
    with pytest.raises(InputError, match="has format 1, known: 0; update hybrid-trainer"):
        HybridTrainer.resume(run)
    assert (run / CHECKPOINTS / "step-2").is_dir()


def test_a_difference_in_a_plug_ins_section_is_named_by_its_path(tmp_path):
    saved = HybridConfig(reward={"type": "length_window", "min": 2, "max": 6})
    with pytest.raises(InputError, match=r"reward\.max 6 → 9"):
        check_edits(saved, replace(saved, reward={"type": "length_window", "min": 2, "max": 9}), tmp_path)
