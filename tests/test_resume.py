"""A run that was stopped or killed goes on as if it had not been."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from whole_run import crash, logged_rows

from hybrid import HybridConfig, HybridTrainer, Policy
from hybrid.cli import main
from hybrid.core import InputError
from hybrid.run import CHECKPOINTS, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
REWARD = {
    "type": "weighted_sum",
    "components": [
        {"type": "sentiment_lexicon", "postprocess": {"type": "ema_normalize", "decay": 0.9}},
        {"type": "length_window", "min": 2, "max": 6},
        {"type": "exploration"},
    ],
}


def config(stories, tmp_path, name, **sections):
    """A run of 9 steps, SFT and PPO, that evaluates after 4 and 8 and saves after every second and the last."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Tell me about day {i}.", "target": f"It was a good day, number {i}."} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"name": stories},
        "data": {"train": str(data), "eval_fraction": 0.25},
        "reward": REWARD,
        "sampling": {"max_new_tokens": 8},
        "mixing": {"cycles": 3, "sft_steps_per_cycle": 2, "ppo_steps_per_cycle": 1},
        "optimizer": {"lr": 1e-3},
        "scheduler": {"name": "cosine"},
        "kl": {"coef": 0.2, "adaptive": True, "horizon": 100},
        "sft": {"batch_size": 2},
        "ppo": {"batch_size": 4, "minibatch_size": 2, "epochs": 1},
        "eval": {"num_prompts": 3, "every": 4},
        "checkpoint": {"every": 2},
        "run": {"output": str(tmp_path / name)},
    }
    return values | sections


def weights(folder):
    from safetensors.torch import load_file

    both = load_file(folder / "export" / "model.safetensors") | load_file(folder / "export" / "value_head.safetensors")
    return torch.cat([both[name].flatten() for name in sorted(both)])


@pytest.fixture
def whole(stories, tmp_path):
    """The folder of a run that nobody disturbed."""
    HybridTrainer(config=HybridConfig.from_dict(config(stories, tmp_path, "whole"))).train()
    return tmp_path / "whole"


def assert_equal_runs(one, other):
    assert logged_rows(one) == logged_rows(other)
    samples = [list(read_jsonl(folder / "samples.jsonl")) for folder in (one, other)]
    assert samples[0] == samples[1]
    assert torch.equal(weights(one), weights(other))


@pytest.mark.slow
@pytest.mark.parametrize("fatal_step", [3, 4, 8])
def test_a_run_that_died_and_goes_on_equals_the_uninterrupted_one(stories, tmp_path, whole, fatal_step):
    trainer = HybridTrainer(config=HybridConfig.from_dict(config(stories, tmp_path, "part")))
    crash(trainer, fatal_step)

    resumed = HybridTrainer.resume(tmp_path / "part")
    assert resumed.num_steps == (fatal_step - 1) // 2 * 2
    evaluation = resumed.train()
    assert evaluation["num_prompts"] == 3
    assert_equal_runs(tmp_path / "part", whole)
    # The two newest, and the best of those that were evaluated.
    kept = {path.name for path in (tmp_path / "part" / CHECKPOINTS).iterdir()}
    assert {"step-8", "step-9"} <= kept and len(kept) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_tells_how_to_go_on(stories, tmp_path, whole, number, capsys):
    file = tmp_path / "part.json"
    file.write_text(json.dumps(config(stories, tmp_path, "part", checkpoint={"every": 0})))
    # The signal comes in the middle of the fifth step.
    program = (
        "import os, sys\nfrom hybrid.cli import main\nfrom hybrid.trainer import HybridTrainer\n"
        "step = HybridTrainer.sft_step\n"
        "def signalled(self, batch):\n"
        f"    if self.num_steps == 5: os.kill(os.getpid(), {int(number)})\n"
        "    return step(self, batch)\n"
        "HybridTrainer.sft_step = signalled\n"
        "sys.exit(main(['train', sys.argv[1]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, file], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + number, done.stderr
    assert f"stopped by {number.name} after step 5" in done.stderr
    assert f"hybrid train --resume {tmp_path / 'part'}" in done.stderr

    assert main(["train", "--resume", str(tmp_path / "part")]) == 0
    assert_equal_runs(tmp_path / "part", whole)


@pytest.mark.slow
def test_a_broken_checkpoint_is_skipped_with_a_warning(stories, tmp_path, whole):
    newest = whole / CHECKPOINTS / "step-9"
    file = newest / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    before = weights(whole)
    with pytest.warns(UserWarning, match=r"skipped a broken checkpoint.*model\.safetensors"):
        trainer = HybridTrainer.resume(whole)
    assert trainer.num_steps == 8
    trainer.train()
    assert torch.equal(weights(whole), before)


@pytest.mark.slow
def test_a_checkpoint_can_be_evaluated_and_asked(whole, capsys):
    checkpoint = str(whole / CHECKPOINTS / "step-8")
    assert main(["eval", checkpoint]) == 0
    last = next(row for row in read_jsonl(whole / "metrics.jsonl") if row["phase"] == "eval" and row["step"] == 8)
    assert f"{last['sft_loss']:.4f}" in capsys.readouterr().out
    assert main(["generate", checkpoint, "Tell me"]) == 0


def test_what_cannot_be_resumed_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"holds no run: it has no config\.yaml"):
        HybridTrainer.resume(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / CHECKPOINTS / "step-1").mkdir(parents=True)
    with (
        pytest.warns(UserWarning, match="skipped a broken checkpoint"),
        pytest.raises(InputError, match="cannot be resumed: no checkpoint in its checkpoints folder is whole"),
    ):
        HybridTrainer.resume(tmp_path)
    for arguments in ([], ["config.yaml", "--resume", str(tmp_path)]):
        assert main(["train", *arguments]) == 2
        assert "train takes a CONFIG" in capsys.readouterr().err


def test_a_run_of_the_first_floor_plan_goes_on(tokenizer, tmp_path):
    """tests/runs/0.1 was saved after its third step by commit 7d4f462, before a step was a sum of terms. Its
    metrics.jsonl has the fourth too. Today's sampler draws other tokens with the same seed, from the same policy: what
    does not hang on them comes again, to a few tokens' spread."""
    from tiny import tiny_model

    def score(response):
        return float("1" in response)

    shutil.copytree(ROOT / "tests" / "runs" / "0.1", tmp_path / "run")
    expected = logged_rows(tmp_path / "run")[-1]
    trainer = HybridTrainer.resume(
        tmp_path / "run",
        policy_or_name=Policy(tiny_model("llama", seed=1)),
        tokenizer=tokenizer,
        train_data=[{"prompt": f"the w{i} w{i + 1}", "target": f"was good w{i} w{i + 1} w{i + 2}"} for i in range(8)],
        ptx_data=[{"text": f"it is a w{i} and a fine w{i + 2} w{i + 3}"} for i in range(6)],
        reward=score,
    )
    assert trainer.num_steps == 3
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-3" / "model" / "model.safetensors")
    own = trainer.policy.backbone.model.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in saved.items())
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {3}
    trainer.train()
    found = logged_rows(tmp_path / "run")[-1]
    assert found.keys() == expected.keys()
    assert {name: found[name] for name in ("step", "phase", "cycle")} == {"step": 4, "phase": "ppo", "cycle": 0}
    for name in ("lr", "kl_coef", "value_mean", "response_length"):
        assert found[name] == expected[name]
    assert found["entropy"] == pytest.approx(expected["entropy"], rel=0.05)
