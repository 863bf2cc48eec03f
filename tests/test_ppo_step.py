"""The benchmark of a PPO iteration: that all contenders do the same work."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from benchmarks.contenders.protocol import PPOJob, PPOMeter, rewards
from benchmarks.ppo_step import Contender

ROOT = Path(__file__).resolve().parents[1]
JOB = PPOJob("model", [[1, 2], [3, 4], [5, 6]], response_length=4, epochs=2, minibatch_size=2, device="cpu")


def test_an_iteration_is_counted_by_hand():
    # Three rows of 2 + 4 tokens, twice, in minibatches of 2 and 1; the checksum is of ids + 1.
    assert JOB.counts == {"prompt_ids": 27, "generated_tokens": 12, "trained_tokens": 36, "updates": 4}


def test_the_meter_counts_what_the_policy_embeds_with_a_gradient_and_the_optimizers_steps():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = PPOMeter(model, optimizer, JOB)
    prompts = torch.tensor(JOB.prompts)
    meter.begin()
    with torch.no_grad():
        # Two rows, then one: of what an engine drew, the policy sees the prompts only when it scores.
        model(torch.cat([prompts, prompts], 1)[:2])
        meter.generated(12)
        model(prompts[2:])
        model(prompts)
    model(torch.cat([prompts, prompts], 1)).logits.sum().backward()
    optimizer.step()
    answer = meter.end()
    assert answer["counts"] == {"prompt_ids": 27, "generated_tokens": 12, "trained_tokens": 12, "updates": 1}
    assert list(answer["seconds"]) == ["generate", "score", "update", "all"]
    assert all(seconds > 0 for seconds in answer["seconds"].values())


def test_a_reward_is_the_share_of_even_ids():
    assert rewards(["2 4 7 8", "1"]) == [0.75, 0.0]


def test_a_contender_is_told_the_options_of_all_of_ours_and_then_its_own():
    job = Contender("ours+generate:ppo.epochs=1,model.precision=bfloat16").job(JOB, ["ppo.epochs=3"])
    assert job.options == ("ppo.epochs=3", "ppo.epochs=1", "model.precision=bfloat16")
    assert job.rollout == "generate"
    assert Contender("trl-1.12.0:bf16=true").job(JOB, ["ppo.epochs=3"]).fields == {"bf16": True}


@pytest.mark.parametrize("name", ["trl-0.12.0", "ours+beam", "trl-1.12.0+generate"])
def test_an_unknown_contender_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown contender {name!r}".replace("+", r"\+")):
        Contender(name).check()


@pytest.mark.slow
def test_a_round_of_ours_runs_and_a_contender_that_is_not_installed_is_left_out():
    command = [sys.executable, "benchmarks/ppo_step.py", "--quick", "--threads", "1", "--sizes", "tiny",
               "--contenders", "ours", "ours+generate", "trl-0.11.4", "--trl-python", sys.executable]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, second, *_, header, ours, generated = done.stdout.splitlines()
    assert first.startswith("trl-0.11.4 is left out: ")
    assert second.endswith("768 generated tokens, 5120 trained tokens, 16 updates")
    assert header.split()[:2] == ["size", "contender"]
    assert [line.split()[1] for line in (ours, generated)] == ["ours", "ours+generate"]
