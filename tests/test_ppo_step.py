"""The benchmark of a PPO iteration: that all contenders do the same work, and what becomes of one that does not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from benchmarks.ppo_contenders.protocol import Job, Meter, rewards
from benchmarks.ppo_process import Contender, Failed
from benchmarks.ppo_step import by_turns

ROOT = Path(__file__).resolve().parents[1]
JOB = Job("model", [[1, 2], [3, 4], [5, 6]], response_length=4, epochs=2, minibatch_size=2, device="cpu")


def test_an_iteration_is_counted_by_hand():
    # Three rows of 2 + 4 tokens, twice, in minibatches of 2 and 1; the checksum is of ids + 1.
    assert JOB.counts == {"prompt_ids": 27, "generated_tokens": 12, "trained_tokens": 36, "updates": 4}


def test_the_meter_counts_what_the_policy_embeds_with_a_gradient_and_the_optimizers_steps():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = Meter(model, optimizer, JOB)
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


class Process:
    """A contender that gives these answers, one for each round."""

    def __init__(self, name, *answers):
        self.contender, self.job, self.answers = Contender(name), JOB, iter(answers)

    def iteration(self):
        answer = next(self.answers)
        if isinstance(answer, Failed):
            raise answer
        return answer


GOOD = {"counts": JOB.counts, "seconds": {"all": 1.0}}


def test_the_first_round_is_not_measured():
    assert by_turns([Process("ours", {**GOOD, "seconds": {"all": 9.0}}, GOOD, GOOD)], 2, 1e9) == {"ours": [GOOD, GOOD]}


def test_a_contender_that_makes_fewer_updates_ends_the_run():
    fewer = {**GOOD, "counts": {**JOB.counts, "updates": 3}}
    with pytest.raises(SystemExit, match=r"trl-1.12.0 did other work: .*'updates': 3.*'updates': 4"):
        by_turns([Process("ours", GOOD), Process("trl-1.12.0", fewer)], 0, 1e9)


def test_a_contender_that_ends_is_left_out_with_its_last_words(capsys):
    ended = Process("trl-1.12.0", GOOD, Failed("out of memory"))
    assert by_turns([Process("ours", GOOD, GOOD), ended], 1, 1e9) == {"ours": [GOOD]}
    assert capsys.readouterr().out == "trl-1.12.0 is left out: out of memory\n"


def test_no_round_begins_that_would_end_after_the_deadline(capsys):
    assert by_turns([Process("ours", GOOD, GOOD, GOOD)], 2, 0.0) == {"ours": [GOOD]}
    assert "stopped after 1 rounds" in capsys.readouterr().out


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
