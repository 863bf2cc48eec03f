"""Which figures a run has numbers for, and what its kinds of step are called."""

import pytest
from run.pages import evaluation, preference_rows

from hybrid.run.curves import colours, curves
from hybrid.run.panels import attributed, panels, phase_names

EMPTY = {"sft": [], "ppo": [], "joint": [], "eval": []}


def by_phase(rows):
    found = {phase: [] for phase in EMPTY}
    for row in sorted(rows, key=lambda row: row["step"]):
        found.setdefault(row["phase"], []).append(row)
    return found


def own(*runs):
    """The titles of the panels that not every run has."""
    always = {panel.title for panel in panels([EMPTY])}
    return [panel.title for panel in panels([attributed(run) for run in runs]) if panel.title not in always]


def test_a_run_of_sft_and_ppo_has_the_same_panels_as_one_without_a_row():
    rows = by_phase([{"step": 1, "phase": "sft", "loss": 1.0}, {"step": 2, "phase": "joint", "sft_loss": 1.0}])
    assert own(rows) == []


def test_an_objective_of_preferences_has_loss_accuracy_rewards_and_margin():
    assert own(by_phase(preference_rows())) == ["DPO loss", "Pairwise accuracy", "Rewards", "Margin"]


def test_panels_of_several_objectives_go_by_their_names():
    rows = by_phase([*preference_rows("dpo"), *preference_rows("reward_model", steps=6)])
    assert own(rows)[:4] == ["DPO loss", "Pairwise accuracy, DPO", "Rewards, DPO", "Margin, DPO"]
    assert own(rows)[4:6] == ["Reward model loss", "Pairwise accuracy, reward model"]


def test_an_objective_without_pairs_has_its_loss_alone():
    rows = [{"step": step, "phase": "distill", "loss": 1.0, "kl": 0.5} for step in (1, 2)]
    assert own(by_phase(rows)) == ["Distillation loss"]


def test_answers_of_kto_are_good_and_bad_ones():
    row = {"phase": "kto", "loss": 0.4, "accuracy": 0.5, "desirable_reward": 1.0, "undesirable_reward": -1.0}
    rows = by_phase([{"step": 1, **row}, {"step": 2, **row}])
    assert own(rows) == ["KTO loss", "Accuracy", "Rewards"]
    (rewards,) = (curve for curve in curves(rows) if curve.title == "Rewards")
    assert "good, KTO from 1 to 1, bad, KTO from -1 to -1" in rewards.description


def test_the_parts_of_a_reward_are_no_objectives():
    assert own(by_phase([evaluation(0, **{"reward/length/raw_mean": 1.0, "reward_sem": 0.1})])) == []


def test_a_joint_steps_accuracy_is_of_the_one_objective_that_may_have_found_it():
    rows = by_phase(preference_rows("dpo", phase="joint"))
    (accuracy,) = (curve for curve in curves(rows) if curve.title == "Pairwise accuracy")
    assert "joint DPO from 0.6 to 0.9, held-out evaluation from 0.5 to 0.875" in accuracy.description


def test_a_joint_steps_accuracy_is_left_out_where_two_objectives_may_have_found_it():
    rows = by_phase(preference_rows("dpo", phase="joint"))
    for row in rows["joint"]:
        row |= {"reward_model_loss": 0.5, "reward_model_coef": 1.0}
    drawn = {curve.title: curve.description for curve in curves(rows)}
    assert "joint DPO and reward model" in drawn["DPO loss"]
    assert "joint" not in drawn["Pairwise accuracy"]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"sft_loss": 1.0, "sft_coef": 0.5, "reward": 1.0, "policy_loss": 0.1, "kl_coef": 0.1}, "joint SFT and PPO"),
        ({"dpo_loss": 1.0, "dpo_coef": 1.0, "sft_loss": 1.0, "sft_coef": 0.1}, "joint DPO and SFT"),
        ({"ppo_loss": 0.1, "value_loss": 0.1, "reward_model_loss": 1.0}, "joint PPO and reward model"),
        ({"dpo_loss": 1.0, "kto_loss": 1.0, "sft_loss": 1.0}, "joint DPO, KTO and SFT"),
        ({"calm_loss": 1.0, "calm_coef": 0.1, "sft_loss": 1.0}, "joint calm and SFT"),
    ],
)
def test_a_joint_step_is_called_by_what_it_sums(row, name):
    assert phase_names(by_phase([{"step": 1, "phase": "joint", **row}]))["joint"] == name


def test_each_kind_of_step_has_a_colour_and_those_of_every_run_keep_theirs():
    names = ("dpo", "raft", "distill", "calm")
    found = colours(by_phase([{"step": step, "phase": name, "loss": 1.0} for step, name in enumerate(names)]))
    assert [found[name] for name in names] == ["more-0", "more-1", "more-2", "more-0"]
    assert [found[name] for name in EMPTY] == ["sft", "ppo", "joint", "eval"]


def test_an_objective_of_a_users_own_has_its_reward_and_loss_drawn():
    rows = by_phase([{"step": step, "phase": "calm", "loss": 1.0, "reward": 0.5} for step in (1, 2)])
    assert [curve.title for curve in curves(rows)] == ["Reward", "Calm loss"]
