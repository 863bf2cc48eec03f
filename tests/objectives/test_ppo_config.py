"""The settings of a PPO step: what they count, and what they refuse."""

import pytest

from hybrid.objectives import PPOConfig

GROUPED = ["group", "group_mean", "leave_one_out"]


def test_the_batch_counts_prompts_and_the_minibatch_responses():
    assert PPOConfig(batch_size=5, samples_per_prompt=4, minibatch_size=8, epochs=3).num_updates == 3 * 3


def test_a_minibatch_may_hold_every_response_and_no_more():
    assert PPOConfig(batch_size=2, samples_per_prompt=4, minibatch_size=8).num_responses == 8
    with pytest.raises(ValueError, match="batch_size = 2 times samples_per_prompt = 4, got 9"):
        PPOConfig(batch_size=2, samples_per_prompt=4, minibatch_size=9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0), ("minibatch_size", 65), ("microbatch_size", 17), ("epochs", 0), ("clip", 1.1), ("clip", 0.0),
        ("clip_high", 0.0), ("dual_clip", 1.0), ("value_clip", -0.1), ("value_coef", -1.0), ("entropy_coef", -1.0),
        ("gamma", 1.1), ("lam", -0.1), ("target_kl", 0.0), ("lr_factor", -1.0), ("fixed_length", 5),
        ("samples_per_prompt", 0), ("advantage", "grpo"), ("surrogate", "a2c"), ("aggregation", "mean"),
        ("ratio", "row"), ("resample", -1), ("resample", 2),
        ("importance", "tokens"), ("importance_mode", "clip"), ("importance_cap", 0.5),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"PPOConfig.{field}"):
        PPOConfig(**{field: value})


def test_an_unknown_advantage_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of gae, group, group_mean, leave_one_out, reinforce\+\+, got 'rloo'"):
        PPOConfig(advantage="rloo")


@pytest.mark.parametrize("advantage", GROUPED)
def test_an_advantage_within_groups_needs_several_samples_per_prompt(advantage):
    with pytest.raises(ValueError, match=r"PPOConfig.samples_per_prompt must be >= 2 .* got 1"):
        PPOConfig(advantage=advantage)


@pytest.mark.parametrize("advantage", GROUPED)
def test_per_token_whitening_of_rewards_is_refused_where_rows_are_compared(advantage):
    with pytest.raises(ValueError, match=r"PPOConfig\.whiten_reward"):
        PPOConfig(advantage=advantage, samples_per_prompt=2, whiten_reward=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"clip": None, "clip_high": 0.3}, "clip_high"),
        ({"clip": None, "dual_clip": 3.0}, "dual_clip"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "dual_clip"),
    ],
)
def test_clips_that_nothing_would_read_are_refused(options, named):
    with pytest.raises(ValueError, match=f"PPOConfig.{named}"):
        PPOConfig(**options)
