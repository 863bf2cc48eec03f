"""NaN in a reward, a loss or a gradient, a reward that fails, a policy that runs away: what becomes of the run."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hybrid import HybridConfig, HybridTrainer, KLConfig
from hybrid.cli import main
from hybrid.core import InputError, RunStopped
from hybrid.rewards import RewardError
from hybrid.run import CHECKPOINTS, Checkpoints, read_jsonl

ROWS = [{"prompt": f"Tell me about day {i}.", "target": f"It was a good day, number {i}."} for i in range(8)]


def config(tmp_path, **sections):
    """Cycles of an SFT step and a PPO step with two updates, each step followed by a checkpoint."""
    values = {
        "data": {"eval_fraction": 0.0},
        "sampling": {"max_new_tokens": 6},
        "mixing": {"cycles": 2, "sft_steps_per_cycle": 1, "ppo_steps_per_cycle": 1},
        "optimizer": {"lr": 1e-3},
        "sft": {"batch_size": 2},
        "ppo": {"batch_size": 4, "minibatch_size": 2, "epochs": 1},
        "gradient": {"max_skipped": 2},
        "checkpoint": {"every": 1},
        "run": {"output": str(tmp_path / "run")},
    }
    return values | sections


def num_letters(response):
    return float(len(response))


def make(stories, tmp_path, reward=num_letters, **sections):
    made = HybridConfig.from_dict(config(tmp_path, **sections))
    return HybridTrainer(stories, train_data=ROWS, reward=reward, config=made)


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir())


def rows(tmp_path, file="metrics", **wanted):
    found = read_jsonl(tmp_path / "run" / f"{file}.jsonl")
    return [row for row in found if wanted.items() <= row.items()]


def poison(trainer, where, steps):
    """Make the loss or the gradient NaN in these steps of the loop, as a broken kernel would."""

    def nan_loss(module, args, out):
        if torch.is_grad_enabled() and trainer.num_steps in steps:
            out.last_hidden_state = out.last_hidden_state * math.nan
        return out

    if where == "loss":
        trainer.policy.backbone.trunk.register_forward_hook(nan_loss)
    else:
        spoil = lambda gradient: gradient * math.nan if trainer.num_steps in steps else gradient  # noqa: E731
        next(trainer.policy.parameters()).register_hook(spoil)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_its_rows_are_kept(stories, tmp_path, capsys, where):
    trainer = make(stories, tmp_path, gradient={"max_skipped": 3})
    poison(trainer, where, steps=(1, 4))
    trainer.train()

    sft, ppo = rows(tmp_path, phase="sft"), rows(tmp_path, phase="ppo")
    assert [row["skipped"] for row in sft] == [1.0, 0.0]
    assert [row["skipped_updates"] for row in ppo] == [0.0, 2.0]
    assert f"step 1: skipped an update with loss {'nan' if where == 'loss' else ''}" in capsys.readouterr().err
    shown = rows(tmp_path, "samples", phase="skipped", step=1)
    assert [row["index"] for row in shown] == [0, 1]
    for row in shown:
        assert any(one["prompt"] in row["prompt"] and one["target"] in row["target"] for one in ROWS)
    # Of the rollout's first minibatch alone, with what it answered and was given for that.
    shown = rows(tmp_path, "samples", phase="skipped", step=4)
    whole = rows(tmp_path, "samples", phase="ppo", step=4)
    assert [row["reward"] for row in shown] == [row["reward"] for row in whole[:2]]
    assert all(other["response"] in row["response"] for row, other in zip(shown, whole, strict=False))


def test_skipped_steps_change_no_weight_and_no_state_of_the_optimizer(stories, tmp_path):
    trainer = make(stories, tmp_path, kl={"adaptive": True}, gradient={"max_skipped": 5})
    trainer.sft_step(next(trainer.loader))
    rollout = trainer.rollout(next(trainer.prompts))
    before = [x.clone() for x in state_of(trainer)]
    nan = {name: getattr(rollout, name) * math.nan for name in ("reward", "kl", "score")}
    metrics = trainer.ppo_step(replace(rollout, **nan))
    assert metrics["skipped_updates"] == 2.0
    assert all(torch.equal(x, y) for x, y in zip(before, state_of(trainer), strict=True))
    assert trainer.kl.coef == KLConfig().coef
    assert all(math.isfinite(x) for x in trainer.ppo_step(rollout).values())


def state_of(trainer):
    state = trainer.optimizer.state_dict()["state"]
    return [*trainer.policy.state_dict().values(), *(x for one in state.values() for x in one.values())]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_too_many_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(stories, tmp_path, where):
    trainer = make(stories, tmp_path)
    poison(trainer, where, steps=(3, 4))
    with pytest.raises(RunStopped, match="2 updates in a row") as stopped:
        trainer.train()
    (note,) = stopped.value.__notes__
    assert f"The last good checkpoint is {tmp_path / 'run' / CHECKPOINTS / 'step-2'}:" in note
    assert kept(tmp_path) == ["step-1", "step-2"]
    assert trainer.updater.on_skip is None


def test_without_a_checkpoint_it_says_so(stories, tmp_path):
    trainer = make(stories, tmp_path, gradient={"max_skipped": 1})
    poison(trainer, "loss", steps=(1,))
    with pytest.raises(RunStopped) as stopped:
        trainer.train()
    assert stopped.value.__notes__ == ["There is no checkpoint to go back to."]


def test_the_command_line_says_it_in_one_line_and_exits_with_one(stories, tmp_path, capsys):
    data, file = tmp_path / "data.jsonl", tmp_path / "config.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    # Shaped rewards beyond float32.
    values = config(tmp_path, score={"scale": 1e39}, reward={"type": "length_window", "min": 2, "max": 6})
    file.write_text(json.dumps(values | {"model": {"name": stories}, "data": {"train": str(data)}}))
    assert main(["train", str(file)]) == 1
    told = capsys.readouterr().err.splitlines()
    (line,) = [line for line in told if line.startswith("hybrid:")]
    assert "2 updates in a row" in line and f"{CHECKPOINTS}/step-1: hybrid train --resume" in line
    assert not any("Traceback" in line for line in told)
    assert (tmp_path / "run" / "report.html").is_file()


BAD = {
    "nan": math.nan,
    "inf": math.inf,
    "none": None,
    "string": "0.5",
    "list": [0.5, 0.5],
}


@pytest.mark.parametrize("kind", [*BAD, "raises", "too_few"])
def test_a_reward_that_fails_stops_the_run_and_leaves_its_checkpoint_whole(stories, tmp_path, kind):
    calls = []

    def reward(responses, **_):
        calls.append(None)
        if len(calls) == 1:
            return [0.5] * len(responses)
        if kind == "raises":
            raise ZeroDivisionError("of the user")
        return [0.5] * (len(responses) - 1) + ([] if kind == "too_few" else [BAD[kind]])

    trainer = make(stories, tmp_path, reward)
    with pytest.raises(RewardError) as failed:
        trainer.train()
    assert "'reward'" in str(failed.value) or "'python'" in str(failed.value)
    where, way_back = failed.value.__notes__
    assert where == f"It is sample {3 if kind in BAD else 0} of the batch."
    checkpoint = tmp_path / "run" / CHECKPOINTS / "step-3"
    assert str(checkpoint) in way_back
    Checkpoints.verify(checkpoint)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_mended_reward_goes_on_from_the_last_good_checkpoint(stories, tmp_path):
    def broken(response):
        return math.nan

    with pytest.raises(RewardError):
        make(stories, tmp_path, broken).train()
    HybridTrainer.resume(tmp_path / "run", train_data=ROWS, reward=num_letters).train()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_a_kl_beyond_its_limit_stops_the_run_and_names_the_checkpoint_before_it(stories, tmp_path):
    kl = {"kind": "k3", "limit": 1e-6, "patience": 2}
    with pytest.raises(RunStopped, match=r"diverged.*beyond kl.limit = 1e-06 for 2 rollouts in a row") as stopped:
        make(stories, tmp_path, kl=kl).train()
    assert f"{CHECKPOINTS}/step-1:" in stopped.value.__notes__[0]
    assert kept(tmp_path) == ["step-1"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_a_kl_within_its_limit_stops_nothing(stories, tmp_path):
    make(stories, tmp_path, kl={"limit": 50.0, "patience": 1}).train()
    assert len(rows(tmp_path)) == 4


@pytest.mark.parametrize(("key", "value"), [("limit", 0.0), ("limit", math.nan), ("patience", 0)])
def test_a_limit_out_of_range_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"KLConfig.{key}"):
        KLConfig(**{key: value})


def test_a_run_whose_updates_run_out_of_memory_goes_on_in_smaller_microbatches(stories, tmp_path):
    scored = []

    def full(module, args, kwargs):
        if torch.is_grad_enabled():
            if len(kwargs["input_ids"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        elif not kwargs["use_cache"]:
            scored.append(len(kwargs["input_ids"]))

    trainer = make(stories, tmp_path)
    trainer.policy.backbone.trunk.register_forward_pre_hook(full, with_kwargs=True)
    with pytest.warns(UserWarning) as told:
        trainer.train()
    keys = [str(warning.message).rsplit(": ")[-1] for warning in told]
    assert keys == ["sft.microbatch_size=1", "ppo.microbatch_size=1"]
    first, second = rows(tmp_path, phase="ppo")
    assert first["skipped_updates"] == second["skipped_updates"] == 0.0
    # Rollouts follow: the first ratios are 1 where the same rows go through the same products.
    assert scored == [2, 2, 1, 1, 1, 1]


def test_gradient_checkpointing_changes_no_step_of_either_phase(stories, tmp_path):
    trained = []
    for on in (False, True):
        trainer = make(stories, tmp_path / str(on), model={"gradient_checkpointing": on})
        trainer.sft_step(next(trainer.loader))
        trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
        trained.append(state_of(trainer))
    assert all(torch.equal(x, y) for x, y in zip(*trained, strict=True))


@pytest.mark.slow
def test_a_float16_run_learns_and_resumes_bit_for_bit(stories, tmp_path):
    model = {"precision": "float16", "gradient_checkpointing": True}
    mixing = {"cycles": 4, "sft_steps_per_cycle": 1, "ppo_steps_per_cycle": 1}
    whole, part = (make(stories, tmp_path / name, model=model, mixing=mixing) for name in ("whole", "part"))
    whole.train()
    # torch's first scales are too large for this model's first gradients, which is no fault: each overflow halves the
    # scale, until one fits. How many that takes depends on how the processor rounds.
    scales = [(row["loss_scale"], row["overflow"]) for row in rows(tmp_path / "whole", phase="sft")]
    assert scales[0] == (65536.0, 1.0)
    assert scales[-1][1] == 0.0
    assert not rows(tmp_path / "whole", "samples", phase="skipped")

    step, part.sft_step = part.sft_step, lambda batch: step(batch) if part.num_steps < 3 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        part.train()
    resumed = HybridTrainer.resume(tmp_path / "part" / "run", train_data=ROWS, reward=num_letters)
    resumed.train()
    assert all(torch.equal(x, y) for x, y in zip(state_of(whole), state_of(resumed), strict=True))
    assert resumed.updater.scaler.state_dict() == whole.updater.scaler.state_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": {"ppo": {"epochs": 1}}}, "config must be a HybridConfig, got dict: HybridConfig.from_dict"),
        ({"policy_or_name": 3}, "the policy must be a Policy, a transformers model or a model's name, got 3"),
        ({"policy_or_name": torch.nn.Linear(2, 2)}, "the policy must be a Policy"),
        ({"tokenizer": 3}, "the tokenizer must be a transformers tokenizer or a model's name, got 3"),
    ],
)
def test_what_a_trainer_cannot_be_made_of_is_one_line(stories, given, message):
    with pytest.raises(InputError, match=message):
        HybridTrainer(**{"policy_or_name": stories, "train_data": [{"prompt": "a", "target": "b"}]} | given)


@pytest.mark.parametrize("epochs", ["3", -1, float("nan"), float("inf"), True, []])
def test_epochs_are_a_number_of_passes(stories, epochs):
    trainer = HybridTrainer(stories, train_data=[{"prompt": "a", "target": "b"}])
    with pytest.raises(InputError, match="epochs must be a number of passes"):
        trainer.train(epochs=epochs)
    with pytest.raises(InputError, match="rl_epochs must be a number of passes"):
        trainer.run_training(1, epochs)


def test_a_tokenizer_may_be_given_by_name(stories):
    assert HybridTrainer(stories, stories).tokenizer.eos_token_id == HybridTrainer(stories).tokenizer.eos_token_id


@pytest.mark.parametrize(
    "step", [(None, None, None), (["hi"], ["ho"], [1.0]), ([[1]], [[3]], 3), ([[1]], [[3]], [10**400])]
)
def test_what_is_no_list_of_ids_and_scores_is_one_line(stories, step):
    with pytest.raises(InputError, match=r"step needs lists|must be token ids|must be a number"):
        HybridTrainer(stories).step(*step)


def test_a_warm_up_longer_than_its_run_is_told_with_both_numbers(stories, caplog):
    config = HybridConfig.from_dict(
        {
            "mixing": {"strategy": "sequential", "sft_steps": 2, "ppo_steps": 0},
            "scheduler": {"name": "cosine", "NUM_WARMUP_STEPS": 1000},
        }
    )
    HybridTrainer(stories, train_data=[{"prompt": "a", "target": "b"}], config=config).train()
    assert "warms up for 1000 optimizer steps, and this run makes 2" in caplog.text


def test_no_bar_of_a_library_stands_in_the_log(stories, tmp_path, capfd):
    HybridTrainer(stories).save(tmp_path / "saved")
    assert capfd.readouterr().err == ""
