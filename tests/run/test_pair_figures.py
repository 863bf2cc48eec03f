"""Held-out pairs in a report: the bins and counts by hand, and that they are those of the measured error."""

import math

import pytest
import torch
from run.pages import pair_row

from hybrid.objectives import expected_calibration_error
from hybrid.run.pair_figures import calibration, evaluated_pairs, pair_figures, pairs_side_by_side


def logit(confidence):
    return math.log(confidence / (1 - confidence))


def test_a_bin_has_the_share_right_and_the_mean_confidence_of_its_choices():
    # 0.82 and 0.84 are in the seventh of ten bins over [1/2, 1]; the second choice is wrong, whatever its sign says.
    found = calibration([logit(0.82), -logit(0.84), logit(0.99)])
    assert list(found) == [6, 9]
    assert found[6] == pytest.approx((2, 0.83, 0.5))
    assert found[9] == pytest.approx((1, 0.99, 1.0))


def test_a_tie_is_half_right_at_a_confidence_of_one_half():
    assert calibration([0.0]) == {0: (1, 0.5, 0.5)}


def test_a_difference_beyond_what_an_exponential_holds_is_of_full_confidence():
    assert calibration([-1e6]) == {9: (1, 1.0, 0.0)}


def test_the_bins_are_those_of_the_calibration_error():
    differences = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    bins = calibration(differences.tolist()).values()
    error = sum(b.size * abs(b.right - b.confidence) for b in bins) / sum(b.size for b in bins)
    assert error == pytest.approx(expected_calibration_error(differences), abs=1e-12)
    wrong = sum(b.size * abs(b.right - b.confidence) for b in calibration((-differences).tolist()).values()) / 200
    assert abs(wrong - error) > 0.01


def test_only_the_first_and_the_last_evaluation_are_taken_in_order_of_index():
    rows = [pair_row(step, index, step, 0.0) for step in (0, 2, 4) for index in (1, 0)]
    ((first, before), (last, after)) = evaluated_pairs(rows)["dpo"]
    assert (first, last) == (0, 4)
    assert [row["index"] for row in before] == [0, 1]
    assert [row["chosen_reward"] for row in after] == [4, 4]


def test_a_row_that_a_resumed_run_repeats_counts_once():
    rows = [pair_row(0, 0, 1.0, 0.0), pair_row(0, 0, 2.0, 0.0)]
    ((_, only),) = evaluated_pairs(rows)["dpo"]
    assert [row["chosen_reward"] for row in only] == [2.0]


def test_only_a_reward_models_difference_means_a_probability():
    rows = [pair_row(step, i, 0.3 * i - step, 0.1, name) for name in ("dpo", "reward_model") for step in (0, 4)
            for i in range(6)]  # fmt: skip
    assert [figure.title for figure in pair_figures(evaluated_pairs(rows))] == [
        "Margins, DPO",
        "Calibration, reward model",
        "Margins, reward model",
    ]


def test_figures_say_in_words_what_they_show():
    rows = [pair_row(0, i, 0.0, 0.0, "reward_model") for i in range(4)]
    rows += [pair_row(4, i, reward, 0.0, "reward_model") for i, reward in enumerate((logit(0.8), 3.0, -1.0, 4.0))]
    calibrated, margins = pair_figures(evaluated_pairs(rows))
    assert "of 1 pairs at 0.73 0.00 right" in calibrated.description
    assert "at step 0 from 0 to 0, 0 of 4 below 0; at step 4 from -1 to 4, 1 of 4 below 0" in margins.description
    assert "all 4" in margins.svg


def test_a_histogram_counts_each_pair_once():
    from hybrid.run.pair_figures import _counts

    assert _counts([-2.0, -1.0, -0.5, 0.0, 1.0, 2.0], [-2.0, -1.0, 0.0, 1.0, 2.0]) == [1, 2, 1, 2]


def test_rewards_that_are_no_numbers_are_left_out_of_the_figures():
    rows = [pair_row(0, 0, None, 0.0), pair_row(0, 1, 1.0, None)]
    assert pair_figures(evaluated_pairs(rows)) == []


def test_a_pair_has_what_each_objective_said_before_and_after():
    rows = [pair_row(step, 0, a, b) for step, a, b in ((0, 0.0, 0.0), (4, 1.0, 2.0))]
    # All objectives' rows of an evaluation are numbered through.
    rows += [pair_row(step, 1, 3.0, 1.0, "reward_model", prompt="Prompt 0", chosen="Good 0", rejected="Bad 0")
             for step in (0, 4)]  # fmt: skip
    (pair,) = pairs_side_by_side(evaluated_pairs(rows), 12)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("Prompt 0", "Good 0", "Bad 0")
    assert [judged.objective for judged in pair["judged"]] == ["DPO", "reward model"]
    assert pair["judged"][0].rewards == ((0.0, 0.0), (1.0, 2.0))
    assert [judged.verdicts for judged in pair["judged"]] == [("tie", "wrong"), ("right", "right")]


def test_only_pairs_of_both_evaluations_are_shown_and_no_more_than_asked():
    rows = [pair_row(0, i, 0.0, 0.0) for i in range(1, 6)] + [pair_row(4, i, 0.0, None) for i in range(5)]
    shown = pairs_side_by_side(evaluated_pairs(rows), 3)
    assert [pair["prompt"] for pair in shown] == ["Prompt 1", "Prompt 2", "Prompt 3"]
    assert shown[0]["judged"][0].verdicts == ("tie", "unknown")
