"""The suites of benchmarks/suites: the published settings to the number, their rows, and a smoke run of each."""

import json
import math
import random

import pytest
from rewards.checkpoints import SENTIMENT, bert
from tiny import tiny_model

from benchmarks.suites import hub, run
from benchmarks.suites.data import review_halves, review_queries
from benchmarks.suites.measure import LengthDrawn, corpus_windows
from benchmarks.suites.suites import HERE, SUITES, arms_of, suite_config
from hybrid import DataConfig, Example, HybridConfig, InputError, Policy, SamplingConfig, make_reward
from hybrid.core import IGNORE
from hybrid.setup import load_tokenizer


def setting(config, *names):
    """The values of dotted keys."""
    values = []
    for name in names:
        value = config.to_dict()
        for key in name.split("."):
            value = value[key]
        values.append(value)
    return values


def review(text, label):
    return Example("", text, item={"label": label})


@pytest.mark.parametrize("name", SUITES)
def test_a_suites_config_is_one_that_hybrid_train_reads(name):
    assert arms_of(HybridConfig.from_file(HERE / f"{name}.yaml")).keys() == {
        "zero_shot", "sft_only", "rl_only", "sequential", "alternate",
    }  # fmt: skip


def test_imdb_rl4lms_has_the_numbers_of_its_repository():
    config = suite_config("imdb_rl4lms")
    assert setting(config, "model.name", "data.prompt_tokens", "reward.model", "reward.target") == [
        "lvwerra/gpt2-imdb", 64, "lvwerra/distilbert-imdb", "POSITIVE",
    ]  # fmt: skip
    assert setting(
        config, "sampling.min_new_tokens", "sampling.max_new_tokens", "sampling.top_k", "sampling.temperature"
    ) == [48, 48, 50, 1.0]
    ppo = config.ppo
    assert (ppo.epochs, ppo.clip, ppo.value_clip, ppo.gamma, ppo.lam) == (5, 0.2, None, 0.99, 0.95)
    assert ppo.value_coef / 2 == 0.5  # theirs stands before the whole squared error
    assert round(ppo.batch_size * 48 / 1280, 1) == 1.0  # tokens of an iteration
    rate = config.optimizer["lr"]
    assert (rate, rate * ppo.lr_factor) == (1e-5, pytest.approx(1e-6))
    kl = config.kl
    assert (kl.kind, kl.coef, kl.target / 48, ppo.batch_size / kl.horizon) == ("k1", 0.1, 0.5, pytest.approx(0.1))
    assert config.mixing["cycles"] == 50
    assert SUITES["imdb_rl4lms"].published == {
        "zero_shot": {"reward": 0.489, "perplexity": 32.2},
        "sft_only": {"reward": 0.539, "perplexity": 35.5},
        "rl_only": {"reward": 0.602, "perplexity": 33.8},
        "sequential": {"reward": 0.626, "perplexity": 35.0},
    }


def test_imdb_trl_has_the_numbers_of_trl_0_11():
    config = suite_config("imdb_trl")
    assert config.model.name == "lvwerra/gpt2-imdb"
    assert config.reward == {
        "type": "reward_model", "path": "lvwerra/distilbert-imdb", "label": "POSITIVE", "input": "text",
    }  # fmt: skip
    assert (config.optimizer["name"], config.optimizer["lr"]) == ("adam", 1.41e-5)
    ppo = config.ppo
    assert (ppo.batch_size, ppo.minibatch_size, ppo.epochs) == (128, 128, 4)
    assert (ppo.gamma, ppo.lam, ppo.clip, ppo.value_clip, ppo.value_coef) == (1.0, 0.95, 0.2, 0.2, 0.1)
    kl = config.kl
    assert (kl.adaptive, kl.coef, kl.target, kl.horizon) == (True, 0.2, 6.0, 10_000)
    assert (config.sampling.top_k, config.sampling.top_p, config.sampling.min_new_tokens) == (0, 1.0, 0)
    assert SUITES["imdb_trl"].response_tokens == (4, 16)
    assert config.sampling.max_new_tokens == 15  # the longest that range(4, 16) holds
    assert config.mixing["cycles"] == 24_895 // 128


def test_arms_with_both_kinds_of_step_take_the_same_number_of_each():
    arms = arms_of(suite_config("wikitext", ["mixing.cycles=7", "mixing.sft_steps_per_cycle=3"]))
    assert [(stage["sft_steps"], stage["ppo_steps"]) for stage in arms["sequential"]] == [(21, 0), (0, 7)]
    assert arms["sft_only"] + arms["rl_only"] == arms["sequential"]


def test_a_mixing_that_is_not_alternate_is_refused():
    config = HybridConfig(mixing={"strategy": "sequential"})
    with pytest.raises(InputError, match="must be alternate"):
        arms_of(config)


def test_a_query_has_two_to_seven_tokens_and_the_target_is_the_rest(tokenizer):
    text = "the movie was good and it is fine a sad dull bad happy yes no"
    rows = review_queries([review(text, 1)] * 200, tokenizer, DataConfig(max_length=64))
    assert {len(row["prompt"].split()) for row in rows} == {2, 3, 4, 5, 6, 7}
    assert all(row["prompt"] + row["target"] == text for row in rows)


def test_a_prompt_is_the_end_of_a_reviews_first_half(tokenizer):
    text = "the a it is was good bad fine dull sad"
    rows = review_halves([review(text, 1)], tokenizer, DataConfig(prompt_tokens=3, max_length=64))
    assert [{key: value.strip() for key, value in row.items()} for row in rows] == [
        {"prompt": "it is was", "start": "the a it is was", "target": "good bad fine dull sad"}
    ]


@pytest.mark.parametrize("prepare", [review_halves, review_queries])
def test_a_negative_review_is_only_a_prompt(prepare, tokenizer):
    rows = prepare([review("the a it is was good bad fine dull sad", 0)], tokenizer, DataConfig())
    assert rows[0]["prompt"] and rows[0]["target"] == ""


@pytest.mark.parametrize("prepare", [review_halves, review_queries])
def test_no_row_is_longer_than_max_length(prepare, tokenizer):
    (row,) = prepare([review("good " * 100, 1)], tokenizer, DataConfig(prompt_tokens=8, max_length=30))
    # One for EOS, and a few to spare for a cut that is tokenized another way.
    assert 24 <= len(tokenizer(row["prompt"] + row["target"])["input_ids"]) + 1 <= 30


def test_windows_predict_every_token_but_the_first_once_with_half_a_window_before_it(tokenizer):
    random.seed(0)
    ids = [random.randrange(3, 97) for _ in range(53)]
    windows = corpus_windows(tokenizer.decode(ids), tokenizer, context=16)
    predicted = []
    for number, window in enumerate(windows):
        assert len(window.input_ids) == len(window.labels) <= 16
        places = [i for i, label in enumerate(window.labels) if label != IGNORE]
        assert number == 0 or places[0] >= 8
        assert [window.labels[i] for i in places] == [window.input_ids[i] for i in places]
        predicted += [window.labels[i] for i in places]
    assert predicted == ids


def test_review_sentiment_is_that_of_the_start_and_the_response(tmp_path):
    model = bert(tmp_path / "bert", SENTIMENT)
    whole = make_reward({"type": "review_sentiment", "model": model})
    plain = make_reward({"type": "sentiment", "model": model})
    expected = plain("the good cat is bad")
    assert whole(" is bad", prompt="cat", item={"start": "the good cat"}) == pytest.approx(expected)
    assert whole(" is bad", prompt="the good cat") == pytest.approx(expected)
    assert plain(" is bad") != pytest.approx(expected)


def test_rollouts_have_lengths_drawn_from_the_range(tokenizer):
    trainer = LengthDrawn(
        Policy(tiny_model()), tokenizer, train_data=[{"prompt": "the good w5"}], reward=len, response_tokens=(2, 5),
        config=HybridConfig(sampling=SamplingConfig(max_new_tokens=9)),
    )  # fmt: skip
    # EOS may end a response earlier: a rollout is as wide as its longest.
    widths = [trainer.rollout(["the good w5"] * 16).mask.shape[1] for _ in range(20)]
    assert set(widths) == {2, 3, 4}
    assert trainer.config.sampling.max_new_tokens == 9


def test_an_unreachable_hub_is_told_at_once_with_all_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    with pytest.raises(
        InputError, match=r"model lvwerra/gpt2-imdb, model lvwerra/distilbert-imdb, dataset stan.*smoke"
    ):
        hub.check_hub(suite_config("imdb_trl"))
    with pytest.raises(InputError, match=r"cache: dataset Salesforce/wikitext\. "):
        hub.check_hub(suite_config("wikitext", [f"model.name={tmp_path}"]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["own_data", "--seeds", "0"], "--seeds must lie in"),
        (["own_data", "--arms", "rl"], "unknown arm 'rl'"),
        (["own_data", "ppo.epoch=2"], "did you mean 'ppo.epochs'"),
        (["own_data", "model.lora={}"], "leave model.lora out"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(argv, message, capsys):
    assert run.main(argv) == 2
    assert message in capsys.readouterr().err


CLASSIFIED = {"imdb_rl4lms": ("review_sentiment", "model"), "imdb_trl": ("reward_model", "path")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_a_suite_runs_on_stand_ins(name, shared, tmp_path, capsys):
    overrides = []
    if name in CLASSIFIED:
        kind, parameter = CLASSIFIED[name]
        spec = {"type": kind, parameter: bert(tmp_path / "bert", SENTIMENT)}
        spec |= {"label": "POSITIVE", "input": "text"} if kind == "reward_model" else {"target": "POSITIVE"}
        overrides = [f"reward={json.dumps(spec)}", "eval.num_prompts=8"]
    file = tmp_path / "result.json"
    assert run.main([name, "--smoke", "--seeds", "1", "--output", str(file), *overrides]) == 0
    result = json.loads(file.read_text())
    measures = {one["arm"]: one["metrics"] for one in result["runs"]}
    assert measures.keys() == arms_of(suite_config(name)).keys()
    assert all(math.isfinite(number) for metrics in measures.values() for number in metrics.values())
    assert measures["zero_shot"]["kl"] == pytest.approx(0, abs=1e-5)
    assert measures["sft_only"]["perplexity"] != measures["zero_shot"]["perplexity"]
    assert "| sequential |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_prompt_is_cut_between_the_tokens_of_a_real_tokenizer(stories):
    tokenizer = load_tokenizer(stories)
    text = "Once upon a time, there was a little girl named Lily, who loved to play outside in the park. " * 3
    (row,) = review_queries([review(text, 1)], tokenizer, DataConfig(max_length=256))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    assert prompt == ids[: len(prompt)] and 2 <= len(prompt) < 8
