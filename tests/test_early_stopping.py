"""Early stopping and the best checkpoint: where a run ends, what it keeps, and that a resumed one does the same."""

import json
import math

import pytest
from whole_run import crash, logged_rows

from hybrid import HybridConfig, HybridTrainer, InputError
from hybrid.cli import main
from hybrid.run import CHECKPOINTS, Checkpoints

ROWS = [{"prompt": f"Tell me about day {i}.", "target": f"It was a good day, number {i}."} for i in range(12)]
PAIRS = [
    {"prompt": f"Day {i} was", "chosen": f" good, number {i}.", "rejected": f" a bad one, {i}."} for i in range(12)
]
NAN = math.nan


@pytest.fixture
def make(stories, tmp_path):
    """A trainer whose run takes up to 12 SFT steps and evaluates after every second."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def make(name="run", eval_fraction=0.25, **sections):
        values = {
            "model": {"name": stories},
            "data": {"train": str(data), "eval_fraction": eval_fraction},
            "sampling": {"max_new_tokens": 8},
            "mixing": {"cycles": 12, "sft_steps_per_cycle": 1, "ppo_steps_per_cycle": 0},
            "optimizer": {"lr": 1e-3},
            "sft": {"batch_size": 2},
            "run": {"output": str(tmp_path / name)},
            "references": [],
        } | sections
        values["eval"] = {"num_prompts": 3, "every": 2} | values.get("eval", {})
        return HybridTrainer(config=HybridConfig.from_dict(values))

    return make


@pytest.fixture
def make_on_pairs(make, tmp_path):
    """The same, that takes its steps by one objective of preferences."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))

    def make_on_pairs(objective="dpo", eval_fraction=0.25, **sections):
        return make(
            data={"train": str(pairs), "eval_fraction": eval_fraction},
            mixing={"strategy": "objective", "objective": objective, "steps": 12},
            **{"preferences": {"batch_size": 2}, "references": [{"weight": 1.0}], **sections},
        )

    return make_on_pairs


def scripted(trainer, metric, values):
    """The trainer with evaluations that find `values`, one after the other."""
    left = iter(values)
    trainer.evaluation = lambda: ({metric: next(left)}, [])
    return trainer


def last_evaluation(values, *, patience, min_delta, sign):
    """Which evaluation is the last: the index of the first that has `patience` of no progress behind it, itself one."""
    best, idle = None, 0
    for index, value in enumerate(values):
        better = not math.isnan(value) and (best is None or sign * value > sign * best + min_delta)
        best, idle = (value, 0) if better else (best, idle + 1)
        if idle == patience:
            return index
    return None


@pytest.mark.parametrize(
    ("metric", "values", "patience", "min_delta"),
    [
        ("sft_loss", [3, 2, 1, 1.5, 1.2, 0.9, 0.8], 2, 0.0),
        ("sft_loss", [3, 2, 1, 1.5, 0.9, 1, 1], 2, 0.0),
        ("sft_loss", [3, 2.95, 2.85, 2.8, 2.6, 2.5, 2.4], 2, 0.125),
        ("sft_loss", [3, 3, 3, 3, 3, 3, 3], 1, 0.0),
        ("sft_loss", [3, NAN, 2, NAN, NAN, NAN, 1], 3, 0.0),
        ("sft_loss", [NAN, NAN, 1, 2, 3, 4, 5], 3, 0.0),
        ("positive", [0.1, 0.2, 0.3, 0.2, 0.3, 0.4, 0.5], 2, 0.0),
        ("positive", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 1, 0.0),
    ],
)
def test_a_run_ends_with_the_evaluation_that_ends_the_patience(make, capsys, metric, values, patience, min_delta):
    options = {"metric": metric, "patience": patience, "min_delta": min_delta}
    trainer = make(reward={"type": "sentiment_lexicon"}, checkpoint={"every": 0}, eval=options)
    scripted(trainer, metric, values).train()
    sign = -1 if metric == "sft_loss" else 1
    last = last_evaluation(values, patience=patience, min_delta=min_delta, sign=sign)
    assert trainer.num_steps == (12 if last is None else 2 * last)
    assert ("stopped early after step" in capsys.readouterr().err) == (last is not None)
    assert (trainer.folder / "report.html").is_file()
    assert (trainer.folder / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize(("metric", "best"), [("sft_loss", 6), ("positive", 4)])
def test_the_best_evaluation_has_a_checkpoint_whatever_step_it_is_made_at(make, capsys, metric, best):
    values = [0.5, 0.4, 0.7, 0.2, 0.3, 0.5, 0.6]
    options = {"metric": metric, "patience": 3}
    trainer = make(reward={"type": "sentiment_lexicon"}, checkpoint={"every": 5, "keep_last": 1}, eval=options)
    scripted(trainer, metric, values).train()
    folder = trainer.folder / CHECKPOINTS
    checkpoints = Checkpoints(folder, best=trainer.config.eval.best)
    assert checkpoints.best() == folder / f"step-{best}"
    assert {path.name for path in folder.iterdir()} == {f"step-{best}", "step-10"}
    assert f"the best checkpoint: {checkpoints.best()}" in capsys.readouterr().err


def test_the_best_evaluation_has_a_checkpoint_where_it_is_the_last_as_well(make):
    trainer = make(checkpoint={"every": 100}, eval={"every": 5})
    scripted(trainer, "sft_loss", [0.5, 0.4, 0.3, 0.2]).train()
    assert Checkpoints(trainer.folder / CHECKPOINTS, best=trainer.config.eval.best).best().name == "step-12"


@pytest.mark.parametrize(("fatal_step", "checkpoint"), [(5, 4), (9, 8)])
def test_a_resumed_run_stops_at_the_step_of_the_uninterrupted_one(make, fatal_step, checkpoint):
    # Its loss falls up to step 6 and is higher at 8, where a checkpoint is, and at 10.
    options = {"checkpoint": {"every": 4}, "eval": {"patience": 2}}
    whole = make("whole", **options)
    whole.train()
    assert fatal_step < whole.num_steps < 12, "it was to stop early"

    part = make("part", **options)
    crash(part, fatal_step)
    resumed = HybridTrainer.resume(part.folder)
    assert resumed.num_steps == checkpoint
    resumed.train()
    assert resumed.num_steps == whole.num_steps
    assert logged_rows(part.folder) == logged_rows(whole.folder)


def test_a_run_that_stopped_early_takes_no_step_when_it_is_resumed(make, capsys):
    trainer = make(checkpoint={"every": 2}, eval={"patience": 1})
    evaluation = scripted(trainer, "sft_loss", [1.0, 0.5, 0.7]).train()
    before = logged_rows(trainer.folder)
    resumed = HybridTrainer.resume(trainer.folder)
    assert resumed.train() == evaluation == {"sft_loss": 0.7}
    assert resumed.num_steps == trainer.num_steps == 4
    assert logged_rows(trainer.folder) == before
    assert capsys.readouterr().err.count("stopped early after step 4") == 2


@pytest.mark.parametrize(
    ("metric", "best", "last"),
    [("dpo/accuracy", 4, 8), ("dpo/loss", 6, 10), ("reward_model/ece", 6, 10), ("reward_model/accuracy", 4, 8)],
)
def test_a_run_stops_by_an_objectives_measure_and_keeps_its_best_checkpoint(make_on_pairs, metric, best, last):
    options = {"metric": metric, "patience": 2}
    trainer = make_on_pairs(metric.partition("/")[0], checkpoint={"every": 5, "keep_last": 1}, eval=options)
    scripted(trainer, metric, [0.5, 0.4, 0.7, 0.2, 0.3, 0.5, 0.6]).train()
    assert trainer.num_steps == last
    checkpoints = Checkpoints(trainer.folder / CHECKPOINTS, best=trainer.config.eval.best)
    assert checkpoints.best() == trainer.folder / CHECKPOINTS / f"step-{best}"


def test_a_measure_that_the_objective_finds_is_watched(make_on_pairs):
    trainer = make_on_pairs(checkpoint={"every": 4}, eval={"metric": "dpo/accuracy", "every": 4})
    trainer.train()
    rows = [row for row in logged_rows(trainer.folder) if row["phase"] == "eval"]
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    best = max(rows[1:], key=lambda row: row["dpo/accuracy"])
    checkpoints = Checkpoints(trainer.folder / CHECKPOINTS, best=trainer.config.eval.best)
    kept = json.loads((checkpoints.best() / "manifest.json").read_text())["metrics"]
    assert kept["dpo/accuracy"] == best["dpo/accuracy"]


@pytest.mark.parametrize(("metric", "mode", "lr"), [("dpo/accuracy", "max", 2.5e-4), ("dpo/loss", "min", 5e-4)])
def test_the_rate_falls_where_an_objectives_measure_has_come_to_a_plateau(make_on_pairs, metric, mode, lr):
    # Of four evaluations after the first two are lower and one, the last, is higher than all before.
    scheduler = {"name": "reduce_on_plateau", "mode": mode, "factor": 0.5, "patience": 0}
    trainer = make_on_pairs(scheduler=scheduler, checkpoint={"every": 0}, eval={"metric": metric, "every": 4})
    scripted(trainer, metric, [0.5, 0.4, 0.3, 0.6]).train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_an_objectives_measure_without_held_out_pairs_is_refused(make_on_pairs):
    trainer = make_on_pairs(eval_fraction=0.0, eval={"metric": "dpo/accuracy"})
    with pytest.raises(InputError, match=r"'dpo/accuracy' needs held-out data of its objective"):
        trainer.train()
    assert trainer.num_steps == 0


def test_a_measure_of_an_objective_that_is_not_mixed_is_refused(make):
    with pytest.raises(InputError, match="which is not in mixing"):
        make(eval={"metric": "dpo/accuracy"}).train()


def test_a_measure_that_the_objective_has_not_is_refused_before_the_first_step(make_on_pairs):
    trainer = make_on_pairs(eval={"metric": "dpo/ece"})
    with pytest.raises(InputError, match=r"'dpo/ece' was not measured; this evaluation has .*dpo/accuracy"):
        trainer.train()
    assert trainer.num_steps == 0


def test_patience_without_held_out_data_is_refused(make):
    with pytest.raises(InputError, match=r"eval\.patience needs held-out data"):
        make(eval_fraction=0.0, eval={"patience": 1}).train()


def test_a_part_that_the_reward_does_not_have_is_refused_before_the_first_step(make):
    options = {"metric": "reward/shpe/raw_mean", "mode": "max"}
    trainer = make(reward={"type": "sentiment_lexicon"}, eval=options)
    with pytest.raises(InputError, match="'reward/shpe/raw_mean' was not measured"):
        trainer.train()
    assert trainer.num_steps == 0


@pytest.mark.slow
def test_text_metrics_of_a_run_are_logged_reported_and_measured_on_its_checkpoints(make, capsys):
    names = ["bleu", "chrf", "rouge_l", "token_f1", "exact_match"]
    trainer = make(checkpoint={"every": 4}, eval={"text_metrics": names, "metric": "token_f1", "temperature": 0.0})
    trainer.train()
    rows = [row for row in logged_rows(trainer.folder) if row["phase"] == "eval"]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8, 10, 12]
    assert all(set(names) < set(row) and row["num_targets"] == 3 for row in rows)
    assert rows[-1]["token_f1"] > rows[0]["token_f1"]
    page = (trainer.folder / "report.html").read_text("utf-8")
    assert all(name in page for name in ("BLEU", "chrF", "ROUGE-L", "Word F1", "Exact match"))

    best = Checkpoints(trainer.folder / CHECKPOINTS, best=("token_f1", "max")).best()
    ranked = max(rows[1:], key=lambda row: row["token_f1"])
    assert best == trainer.folder / CHECKPOINTS / f"step-{ranked['step']}"
    capsys.readouterr()
    assert main(["eval", str(best)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {name: printed[name] for name in names} == {name: f"{ranked[name]:.4f}" for name in names}
