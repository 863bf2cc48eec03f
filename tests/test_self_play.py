"""A run whose reward plays the policy against itself as it was."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model
from whole_run import crash, logged_rows, weights

from hybrid import HybridConfig, HybridTrainer, Learner, Policy
from hybrid.core import InputError
from hybrid.host import RunHost
from hybrid.rewards import make_reward

W1 = {"type": "python", "function": lambda response: float(response.split().count("good")), "name": "good"}
ROWS = [{"prompt": f"the w{i} w{i + 1}", "target": f"was good w{i}"} for i in range(12)]


def learner(tokenizer, reward=W1, *, lora=None, precision="float32", play=None, **sections):
    values = {
        "sampling": {"max_new_tokens": 6},
        "ppo": {"batch_size": 8, "minibatch_size": 4, "epochs": 1},
        "data": {"eval_fraction": 0.34},
        "eval": {"num_prompts": 4},
        "optimizer": {"lr": 1e-2},
        "model": {"lora": lora, "precision": precision},
    }
    return Learner(
        Policy(tiny_model()),
        tokenizer,
        ROWS,
        {"type": "self_play", "reward": reward, "refresh": 1, **(play or {})},
        HybridConfig.from_dict(values | sections),
    )


def backbone(learner):
    return {name: x.detach().clone() for name, x in learner.policy.backbone.named_parameters()}


def test_with_greedy_answers_the_policy_as_it_is_draws_every_time(tokenizer):
    made = learner(tokenizer, eval={"num_prompts": 4, "temperature": 0})
    assert made.evaluate()["reward"] == 0.5
    assert made.evaluation()[1][0]["reward"] == 0.5


def test_against_itself_half_of_the_games_are_won(tokenizer):
    """Both draw from one distribution, each by its own numbers: wins and defeats are as likely."""
    by_length = {"type": "python", "function": lambda response: float(sum(map(ord, response)) % 7), "name": "digits"}
    made = learner(tokenizer, by_length, ppo={"batch_size": 256, "minibatch_size": 256, "epochs": 1})
    rollout = made.rollout(ROWS[:8] * 32)
    # 256 games: 4 standard errors of a share.
    assert rollout.score.mean() == pytest.approx(0.5, abs=4 * 0.5 / 16)
    assert 0 < rollout.reward_metrics["reward/digits/draw_share"] < 0.6, "they do not say the same"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "lora"])
def test_the_opponent_answers_with_the_weights_of_the_snapshot(tokenizer, lora, precision, request):
    """In bfloat16 both sides are sampled from shadows of their matrices."""
    if lora:
        request.getfixturevalue("needs_peft")
    made = learner(tokenizer, lora=lora, precision=precision)
    made.reward.after_rollout(None)  # a snapshot of the policy as it is
    opponent, prompts = made.reward._opponent, made.corpus.train[:4]
    as_it_was = opponent.answers(prompts, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in made.policy.backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    changed = backbone(made)
    assert opponent.answers(prompts, generator=torch.Generator().manual_seed(3)) == as_it_was
    assert all(torch.equal(x, changed[name]) for name, x in backbone(made).items()), "the policy is what it was"
    made.reward.after_rollout(None)
    assert opponent.answers(prompts, generator=torch.Generator().manual_seed(3)) != as_it_was


def test_a_snapshot_of_an_adapter_is_the_adapter_alone(tokenizer, needs_peft):
    made = learner(tokenizer, lora={"rank": 4})
    assert made.reward.state_dict()["reward"]["opponent"] == {}
    made.reward.after_rollout(None)
    kept = made.reward.state_dict()["reward"]["opponent"]
    assert kept and all(".lora_" in name for name in kept)
    assert kept.keys() == {name for name, x in made.policy.backbone.named_parameters() if x.requires_grad}
    whole = learner(tokenizer)
    whole.reward.after_rollout(None)
    assert whole.reward.state_dict()["reward"]["opponent"].keys() == backbone(whole).keys()


def test_the_weights_that_stay_frozen_are_not_copied(tokenizer):
    made = learner(tokenizer)
    made.policy.backbone.model.get_input_embeddings().weight.requires_grad_(False)
    made.reward.after_rollout(None)
    copy = made.reward._opponent.model._other.policy.backbone.model
    assert copy.get_input_embeddings().weight is made.policy.backbone.model.get_input_embeddings().weight
    assert copy.lm_head.weight.data_ptr() != made.policy.backbone.model.lm_head.weight.data_ptr()


def test_the_answers_begin_with_the_hints_that_the_policy_was_given(tokenizer):
    made = learner(tokenizer, {"type": "python", "function": lambda response: float(response[:8] == "was good")})
    hinted = [replace(e, prompt_ids=e.input_ids[: len(e.prompt_ids) + 2], num_hint=2) for e in made.corpus.train]
    rollout = made.rollout(hinted)
    assert set(rollout.components["opponent"]) == {1.0}
    assert set(made.rollout(made.corpus.train).components["opponent"]) == {0.0}


def test_an_evaluation_changes_nothing_and_is_the_same_each_time(tokenizer):
    made = learner(tokenizer)
    for _ in range(2):
        made.ppo_step(made.rollout(made.corpus.train[:8]))
    state = made.reward.state_dict()
    kept = {name: (x, x.clone()) for name, x in state["reward"]["opponent"].items()}
    before, random = backbone(made), torch.get_rng_state()
    first = made.evaluation()
    assert made.evaluation() == first
    after = made.reward.state_dict()
    assert after["reward"]["age"] == state["reward"]["age"] == 1
    assert torch.equal(after["reward"]["stream"], state["reward"]["stream"])
    assert torch.equal(torch.get_rng_state(), random)
    for name, x in after["reward"]["opponent"].items():
        assert x.data_ptr() == kept[name][0].data_ptr(), "no copy"
        assert torch.equal(x, kept[name][1])
    assert all(torch.equal(x, before[name]) for name, x in backbone(made).items())
    assert made.reward.age == 1


def test_the_win_rate_rises_when_the_policy_improves_and_the_opponent_stays(tokenizer):
    made = learner(tokenizer, play={"refresh": 1000})
    before = made.rollout(made.corpus.train * 8).reward_metrics["reward/good/win_rate"]
    good = [{"prompt": row["prompt"], "target": "good good good"} for row in ROWS]
    for _ in range(8):
        made.sft_step(good)
    after = made.rollout(made.corpus.train * 8).reward_metrics["reward/good/win_rate"]
    assert abs(before - 0.5) < 0.2
    assert after > 0.9


def test_a_named_opponent_stays_what_it_is(stories, tmp_path):
    values = {"sampling": {"max_new_tokens": 4}, "ppo": {"batch_size": 4, "minibatch_size": 4, "epochs": 1}}
    reward = {"type": "self_play", "reward": {"type": "sentiment_lexicon"}, "opponent": stories}
    made = Learner(stories, None, ROWS, reward, HybridConfig.from_dict(values | {"optimizer": {"lr": 0.1}}))
    prompts = made.corpus.train[:2]
    first = made.reward._opponent.answers(prompts, generator=torch.Generator().manual_seed(0))
    made.ppo_step(made.rollout(made.corpus.train[:4]))
    assert made.reward._opponent.answers(prompts, generator=torch.Generator().manual_seed(0)) == first
    assert made.reward.state_dict()["reward"]["opponent"] == {}


def test_a_named_opponent_with_other_tokens_is_refused(stories, tokenizer):
    with pytest.raises(InputError, match=r"has other tokens than the policy \(.*97\)"):
        learner(tokenizer, play={"opponent": stories})


def test_making_a_named_opponent_costs_no_random_number(stories):
    made = Learner(stories, None, ROWS, None, HybridConfig())
    reward = make_reward({"type": "self_play", "reward": W1, "opponent": stories})
    before = torch.get_rng_state()
    reward.attach(RunHost(made))
    assert torch.equal(torch.get_rng_state(), before)


def run_config(stories, tmp_path, name, **sections):
    """A run of 6 steps, SFT and PPO, that evaluates after the third and saves after every second."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Tell me about day {i}.", "target": f"It was a good day, number {i}."} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inner = {"type": "length_window", "min": 2, "max": 4, "postprocess": {"type": "ema_normalize", "decay": 0.9}}
    values = {
        "model": {"name": stories},
        "data": {"train": str(data), "eval_fraction": 0.25},
        "reward": {"type": "self_play", "refresh": 2, "outcome": "sigmoid", "reward": inner},
        "sampling": {"max_new_tokens": 8},
        "mixing": {"cycles": 3, "sft_steps_per_cycle": 1, "ppo_steps_per_cycle": 1},
        "optimizer": {"lr": 1e-2},
        "sft": {"batch_size": 2},
        "ppo": {"batch_size": 4, "minibatch_size": 2, "epochs": 1},
        "eval": {"num_prompts": 3, "every": 3},
        "checkpoint": {"every": 2},
        "run": {"output": str(tmp_path / name)},
    }
    return HybridConfig.from_dict(values | sections)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "lora"])
def test_a_run_that_died_and_goes_on_equals_the_uninterrupted_one(stories, tmp_path, lora, request):
    if lora:
        request.getfixturevalue("needs_peft")
    model = {"model": {"name": stories, **({"lora": lora} if lora else {})}}
    whole = HybridTrainer(config=run_config(stories, tmp_path, "whole", **model))
    whole.train()
    crash(HybridTrainer(config=run_config(stories, tmp_path, "part", **model)), 5)
    shutil.copytree(tmp_path / "part", tmp_path / "copy")
    resumed = HybridTrainer.resume(tmp_path / "part")
    assert resumed.num_steps == 4
    assert resumed.reward.age == 2
    resumed.train()
    assert logged_rows(tmp_path / "part") == logged_rows(tmp_path / "whole")
    assert torch.equal(weights(resumed), weights(whole))
    states = [made.reward.state_dict()["reward"] for made in (resumed, whole)]
    assert all(torch.equal(x, states[1]["opponent"][name]) for name, x in states[0]["opponent"].items())
    assert torch.equal(states[0]["stream"], states[1]["stream"])
    # A control: without the snapshot the same checkpoint makes another run.
    other = HybridTrainer.resume(tmp_path / "copy")
    other.reward._opponent.load_state_dict({})
    other.train()
    assert logged_rows(tmp_path / "copy") != logged_rows(tmp_path / "whole")
