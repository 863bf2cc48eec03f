"""What an evaluation may be told to watch, and when that has made progress."""

import math

import pytest

from hybrid import HybridConfig, InputError
from hybrid.evaluate import EvalConfig
from hybrid.mixing import make_strategy

SFT_ONLY = make_strategy({"ppo_steps_per_cycle": 0})


@pytest.mark.parametrize(
    ("metric", "mode"), [("sft_loss", "min"), ("perplexity", "min"), ("reward", "max"), ("positive", "max")]
)
def test_the_better_end_of_a_known_metric_is_known(metric, mode):
    assert EvalConfig(metric=metric).best == (metric, mode)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("dpo/accuracy", "max"),
        ("dpo/loss", "min"),
        ("reward_model/accuracy", "max"),
        ("reward_model/ece", "min"),
        ("online_dpo/accuracy", "max"),
    ],
)
def test_the_better_end_of_an_objectives_measure_is_known(metric, mode):
    assert EvalConfig(metric=metric).best == (metric, mode)
    assert EvalConfig(metric=metric).objective == metric.partition("/")[0]


def test_an_objectives_measure_that_has_no_better_end_may_be_given_one():
    assert EvalConfig(metric="reward_model/score_std", mode="min").best == ("reward_model/score_std", "min")


def test_a_part_of_the_reward_is_no_objectives_measure():
    assert EvalConfig(metric="reward/shape/raw_mean", mode="max").objective is None
    assert EvalConfig().objective is None


def test_a_mode_that_is_given_goes_before_the_known_one():
    assert EvalConfig(metric="reward", mode="min").best == ("reward", "min")
    assert EvalConfig(metric="reward/shape/raw_mean", mode="max").best == ("reward/shape/raw_mean", "max")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": "sft_los"}, "unknown eval.metric 'sft_los'; did you mean 'sft_loss'"),
        ({"metric": "bleu"}, "eval.metric 'bleu' is not measured: add it to eval.text_metrics"),
        ({"metric": "kl"}, "'kl' has no better end of its own: set eval.mode"),
        ({"metric": "reward/shape/raw_mean"}, "has no better end of its own"),
        ({"metric": "dpo/margin_mean"}, "has no better end of its own: set eval.mode"),
        ({"metric": "dpoo/accuracy"}, "unknown eval.metric 'dpoo/accuracy'; did you mean 'dpo/accuracy'"),
        ({"metric": "sft/loss"}, "objective 'sft' measures nothing of held-out examples; those that do are"),
        ({"metric": "accuracy"}, "unknown eval.metric 'accuracy'"),
        ({"patience": 2}, "set eval.every"),
        ({"patience": 0, "every": 1}, "patience must be >= 1"),
        ({"min_delta": -1.0}, "min_delta must be >= 0"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
    ],
)
def test_what_cannot_be_watched_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**values)


@pytest.mark.parametrize("section", [{"MODE": "min"}, {}])
def test_a_plateau_of_the_wrong_end_is_refused(section):
    config = {"eval": {"metric": "reward"}, "scheduler": {"name": "reduce_lr_on_plateau", **section}}
    with pytest.raises(InputError, match=r"scheduler.MODE must be 'max'.*eval.metric 'reward'"):
        HybridConfig.from_dict(config)
    config["scheduler"]["MODE"] = "max"
    assert HybridConfig.from_dict(config).eval.best == ("reward", "max")


@pytest.mark.parametrize("metric", ["reward", "positive", "reward/shape/raw_mean", "eos_share"])
def test_a_metric_that_needs_a_reward_is_refused_without_one(metric):
    config = HybridConfig(eval=EvalConfig(metric=metric, mode="max"))
    with pytest.raises(InputError, match=r"needs a reward"):
        config.check_training(SFT_ONLY)


def test_an_objectives_measure_is_refused_where_the_objective_is_not_in_the_mixture():
    config = HybridConfig(eval=EvalConfig(metric="dpo/accuracy"))
    with pytest.raises(
        InputError, match=r"'dpo/accuracy' is a measure of objective 'dpo', which is not in mixing.*sft"
    ):
        config.check_training(SFT_ONLY)
    config.check_training(make_strategy({"strategy": "objective", "objective": "dpo"}))
    config.check_training(make_strategy({"strategy": "blend", "coefs": {"dpo": 1.0, "sft": 0.1}}))


def test_a_plateau_of_the_wrong_end_of_an_objectives_measure_is_refused():
    config = {"eval": {"metric": "dpo/accuracy"}, "scheduler": {"name": "reduce_lr_on_plateau"}}
    with pytest.raises(InputError, match=r"scheduler.MODE must be 'max'.*eval.metric 'dpo/accuracy'"):
        HybridConfig.from_dict(config)


def test_text_metrics_need_no_reward():
    eval_config = EvalConfig(metric="token_f1", text_metrics=("token_f1",))
    HybridConfig(eval=eval_config).check_training(SFT_ONLY)


def test_text_metrics_read_back_from_a_file(tmp_path):
    config = HybridConfig(eval=EvalConfig(text_metrics=("bleu", "token_f1"), metric="bleu", every=2, patience=3))
    config.save(tmp_path / "config.yaml")
    assert HybridConfig.from_file(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("metric", "value", "best", "expected"),
    [
        ("sft_loss", 1.0, None, True),
        ("sft_loss", math.nan, None, False),
        ("sft_loss", math.nan, 1.0, False),
        ("sft_loss", -math.inf, 1.0, False),
        ("sft_loss", 0.74, 1.0, True),
        ("sft_loss", 0.75, 1.0, False),
        ("reward", 1.25, 1.0, False),
        ("reward", 1.26, 1.0, True),
    ],
)
def test_progress_is_more_than_min_delta_towards_the_better_end(metric, value, best, expected):
    assert EvalConfig(metric=metric, min_delta=0.25).improves(value, best) == expected


def test_a_watched_metric_that_was_not_measured_is_refused():
    with pytest.raises(InputError, match=r"'reward/shpe/raw_mean' was not measured; this evaluation has reward, kl"):
        EvalConfig(metric="reward/shpe/raw_mean", mode="max").watched({"reward": 0.0, "kl": 0.0})
    with pytest.raises(InputError, match="'sft_loss' was not measured"):
        EvalConfig(every=1, patience=1).watched({"reward": 0.0})


def test_the_default_metric_may_be_missing_where_nothing_waits_for_it():
    assert EvalConfig().watched({"reward": 0.0}) is None
