"""The measures of an evaluation: which there are, and which end of one is the better."""

import pytest
from run.pages import evaluation

from hybrid.run.measures import better_end, measures_of


@pytest.mark.parametrize(
    ("metric", "end"),
    [
        ("sft_loss", "min"),
        ("reward", "max"),
        ("dpo/accuracy", "max"),
        ("dpo/loss", "min"),
        ("reward_model/ece", "min"),
        ("calm/loss", "min"),
        ("dpo/margin_mean", None),
        ("accuracy", None),
        ("kl", None),
        ("reward/loss/raw_mean", None),
    ],
)
def test_the_better_end_of_a_measure(metric, end):
    assert better_end(metric) == end


def test_measures_of_one_objective_stand_under_their_names():
    found = measures_of([evaluation(0, **{"dpo/accuracy": 0.5, "dpo/margin_mean": 0.1, "dpo/chosen_reward": 1.0})])
    assert [name for key, name, *_ in found if key.startswith("dpo/")] == ["Pairwise accuracy", "Margin"]


def test_measures_of_two_objectives_say_whose_they_are():
    found = measures_of([evaluation(0, **{"dpo/accuracy": 0.5, "reward_model/accuracy": 0.5, "reward_model/ece": 0.1})])
    assert [name for key, name, *_ in found if "/" in key] == [
        "Pairwise accuracy, DPO",
        "Pairwise accuracy, reward model",
        "Calibration error, reward model",
    ]


def test_a_comparison_names_the_rewards_too():
    (row,) = [evaluation(0, **{"dpo/accuracy": 0.5, "dpo/chosen_reward": 1.0})]
    found = {key: name for key, name, *_ in measures_of([row], every=True)}
    assert found["dpo/chosen_reward"] == "Chosen reward"
    assert "dpo/chosen_reward" not in {key for key, *_ in measures_of([row])}
