"""The study of benchmarks/preferences.py: equal tokens, a tenth of the labels wrong, finished runs kept."""

import json
import random
from pathlib import Path

import pytest
from studied import studied

from benchmarks import preferences
from benchmarks.kept import kept
from benchmarks.preferences_hh import length_rule
from benchmarks.preferences_pairs import Prepared, Size, flipped, pairs
from benchmarks.preferences_report import gold_at, judge_table, sweep_table, table, wilson
from benchmarks.preferences_run import ARMS, Watched, arm_config, judge_config, judge_spec, run, train_judge
from hybrid import Example, make_reward

WORDS = ["cat", "dog", "tree", "house", "ball", "red", "big", "little", "sun", "boat"]
ON_LINE = [arm for arm in ARMS if arm.startswith(("online_dpo", "raft", "ppo"))]


def pair_rows(count, *, seed, told_apart):
    """Pairs of random words; told_apart: the better answer begins with another word than the worse one."""
    rng = random.Random(seed)
    sides = (" good", " bad") if told_apart else ("", "")
    rows = []
    for _ in range(count):
        chosen, rejected = (f"{side} {' '.join(rng.sample(WORDS, 3))}." for side in sides)
        rows.append({"prompt": f"One day a {rng.choice(WORDS)}", "chosen": chosen, "rejected": rejected})
    return rows


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def prepare(stories, tmp_path_factory):
    """What a seed's runs share, with the real 260K model as their base."""

    def prepared(*, told_apart=True, share=0.0):
        folder = tmp_path_factory.mktemp("pairs")
        files = {
            name: write(
                folder / f"{name}.jsonl",
                flipped(pair_rows(count, seed=seed, told_apart=told_apart), share, seed=0),
            )
            for seed, (name, count) in enumerate({"train": 64, "held_out": 150}.items())
        }
        prompts = [{"prompt": "Once upon a time", "target": " there was a cat."}, {"prompt": "One day", "target": "."}]
        return Prepared(
            Path(stories),
            files["train"],
            files["train"],
            files["held_out"],
            write(folder / "prompts.jsonl", prompts),
            counts={},
        )

    return prepared


@pytest.fixture(scope="module")
def prepared(prepare):
    return prepare()


@pytest.fixture(scope="module")
def judge(prepared, tmp_path_factory):
    """The folder of a reward model that was hardly trained."""
    output = tmp_path_factory.mktemp("judge") / "0"
    return Path(train_judge(judge_config("reward_model", prepared, output, seed=0), 1)["folder"])


@pytest.mark.parametrize("count", [10, 25, 1000])
def test_a_tenth_of_the_labels_is_wrong_and_which_depends_on_the_seed(count):
    rows = [{"prompt": "", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(count)]
    made = [flipped(rows, 0.1, seed=seed) for seed in (0, 0, 1)]
    assert sum(row["is_flipped"] for row in made[0]) == round(count / 10)
    assert all(row["chosen"].startswith("b") == row["is_flipped"] for row in made[0])
    assert made[0] == made[1]
    assert made[0] != made[2] or count == 10
    assert not any(row["is_flipped"] for row in flipped(rows, 0.0, seed=0))


def test_the_chosen_answer_is_the_one_that_the_gold_reward_prefers(prepared):
    prompts = ["Once upon a time", "It was a good day. She was happy and"] * 4
    made = pairs(prepared.base, prompts, seed=0)
    gold = make_reward({"type": "sentiment_lexicon"})
    chosen, rejected = (gold.score([row[side] for row in made]) for side in ("chosen", "rejected"))
    assert made
    assert all(a > b for a, b in zip(chosen, rejected, strict=True))
    assert made == pairs(prepared.base, prompts, seed=0)


def test_a_step_on_pairs_costs_the_tokens_of_both_sides_and_a_run_ends_with_its_budget(prepared, judge):
    config = arm_config("dpo", prepared, [judge], seed=0)
    cost = int(next(Watched(config).pair_loader).attention_mask.sum())
    for budget, steps in ((cost, 1), (cost + 1, 2)):
        result = run(Size(budget=budget, points=()), config, judge)
        assert result["steps"] == steps
        assert cost * steps * 0.9 < result["tokens"]["trained"] < cost * steps * 1.1


@pytest.mark.parametrize("arm", [pytest.param(arm, marks=pytest.mark.slow if arm in ON_LINE else ()) for arm in ARMS])
def test_every_arm_is_trained_on_the_same_number_of_tokens_to_within_a_step(arm, prepared, judge):
    config = arm_config(arm, prepared, [judge, judge], seed=0)
    first = run(Size(budget=1, points=()), config, judge)
    one_step = first["tokens"]["trained"]
    result = run(Size(budget=one_step + 1, points=(0.01,)), config, judge)
    assert first["steps"] == 1
    assert result["steps"] == 2
    assert one_step < result["tokens"]["trained"] < 3 * one_step
    assert (result["tokens"]["generated"] > 0) == (arm in ON_LINE)
    # Before the first step, at the point on the way, and at the end.
    assert [point["trained"] for point in result["curve"]] == [0, one_step, result["tokens"]["trained"]]
    assert result["curve"][0]["kl"] == 0 != result["curve"][-1]["kl"]


def test_tokens_that_are_only_scored_are_not_counted(prepared, judge):
    trainer = Watched(arm_config("kto", prepared, [judge], seed=0))
    answers = next(trainer.answer_loader)
    trainer.batch_step({"kto": 1.0}, {"kto": answers})
    assert trainer.trained == int(answers.attention_mask.sum())
    assert int(answers.mismatched.attention_mask.sum()) > 0
    trainer.evaluation()
    assert trainer.trained == int(answers.attention_mask.sum())


def test_an_ensemble_of_one_model_twice_scores_as_that_model(judge):
    texts, prompts = [" a good cat.", " a bad dog."], ["One day"] * 2
    alone, twice = (
        make_reward(judge_spec(folders)).score(texts, prompts=prompts) for folders in ([judge], [judge] * 2)
    )
    assert list(alone) == pytest.approx(list(twice))
    assert alone[0] != alone[1]


@pytest.mark.parametrize(("told_apart", "low", "high"), [(True, 0.95, 1.0), (False, 0.35, 0.65)])
def test_a_reward_model_tells_apart_what_can_be_told_apart_and_random_preferences_as_a_coin_does(
    prepare, tmp_path, told_apart, low, high
):
    config = judge_config("reward_model", prepare(told_apart=told_apart), tmp_path / "judge", seed=0, lr=3e-3)
    metrics = train_judge(config, 8_000)["metrics"]
    # 150 random pairs: 0.5 give or take 0.04, three and a half times.
    assert low <= metrics["accuracy"] <= high


def test_accuracy_by_right_labels_undoes_the_flips(prepare, tmp_path):
    config = judge_config("reward_model", prepare(share=0.2), tmp_path / "judge", seed=0, lr=3e-3)
    metrics = train_judge(config, 8_000)["metrics"]
    right = metrics["clean_accuracy"]
    assert right > 0.95
    assert metrics["accuracy"] == pytest.approx(0.8 * right + 0.2 * (1 - right), abs=0.05)


def test_a_finished_run_is_taken_as_it_is_and_made_again_with_other_settings(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"number": len(made)}

    file = tmp_path / "runs" / "one.json"
    assert [kept(file, {"lr": lr}, make)["number"] for lr in (1, 1, 2, 2)] == [1, 1, 2, 2]


def test_a_reward_model_that_was_stopped_is_made_anew_and_a_finished_one_kept(prepared, tmp_path):
    config, another = (
        judge_config("reward_model", prepared, tmp_path / f"judge-{lr}", seed=0, lr=lr) for lr in (0.1, 0.2)
    )
    (tmp_path / "judge-0.1").mkdir()
    (tmp_path / "judge-0.1" / "metrics.jsonl").write_text("{}\n")  # of a run that was killed
    first = train_judge(config, 1)
    train_judge(another, 1)
    weights = Path(first["folder"]) / "model.safetensors"
    began = weights.stat().st_mtime_ns
    assert train_judge(config, 1) == first
    assert weights.stat().st_mtime_ns == began


def test_wilsons_interval_of_five_in_ten():
    # Wilson's formula by hand: (0.5 + 1.92073 / 10) / (1 + 3.84146 / 10), give or take 0.26341.
    found = wilson(5, 10)
    assert found["mean"] == 0.5
    assert (found["low"], found["high"]) == pytest.approx((0.23659, 0.76341), abs=1e-5)


def test_the_rule_of_length_takes_its_side_from_the_training_pairs():
    longer, shorter = (
        Example(prompt="a", target=a, rejected=Example(prompt="a", target=b)) for a, b in (("bbb", "b"), ("b", "bbb"))
    )
    rule = length_rule([longer, longer, shorter], [shorter, shorter, longer, longer])
    assert (rule["prefers"], rule["mean"]) == ("longer", 0.5)
    assert length_rule([shorter], [shorter, shorter, longer])["mean"] == pytest.approx(2 / 3)


def curve(*golds):
    names = ("judge", "kl", "response_length", "distinct_2", "sft_loss")
    return [{"trained": 1000 * i, "gold": gold, **dict.fromkeys(names, 0.0)} for i, gold in enumerate(golds)]


def result(arm, seed, *golds, lr=1e-4):
    tokens = {"trained": 2000, "generated": 1000}
    return {"arm": arm, "seed": seed, "lr": lr, "curve": curve(*golds), "tokens": tokens, "cpu_seconds": 1.0}


def test_the_table_shows_the_end_and_the_best_mean_on_the_way():
    text = table([result("ppo", seed, 0.0, 0.6 + seed / 10, 0.2) for seed in (0, 1)])
    base, ppo = text.splitlines()[2:]
    assert base.startswith("| base |  | 0.000 ± 0.000 |")
    assert ppo.startswith("| ppo | 0.0001 | 0.200 ± 0.000 |")
    assert "| 0.650 at 1k | 2 + 1 |" in ppo


def test_arms_are_compared_where_their_curves_first_come_to_a_kl():
    # The line over sqrt(KL) from (0, 0.0) to (2, 0.8), and back.
    made = [{"kl": kl, "gold": gold} for kl, gold in ((0.0, 0.0), (4.0, 0.8), (1.0, 0.9))]
    assert gold_at(made, 1.0) == pytest.approx(0.4)
    assert gold_at(made, 9.0) is None
    # An estimate below 0 counts as 0.
    assert gold_at([{"kl": -0.1, "gold": 0.0}, {"kl": 1.0, "gold": 1.0}], 0.25) == pytest.approx(0.5)


def test_the_sweep_picks_the_gold_reward_less_its_kl_and_the_accuracy_of_reward_models():
    judges = [{"arm": "reward_model", "lr": lr, "metrics": {"accuracy": a}} for lr, a in ((0.1, 0.7), (0.2, 0.8))]
    runs = [result("dpo", 0, 0.0, gold, lr=lr) for lr, gold in ((0.1, 0.5), (0.2, 0.4), (0.3, 0.9))]
    # 0.9 - 0.05 * 20 is less than 0.5.
    runs[-1]["curve"][-1]["kl"] = 20.0
    bold = [line.split(" | ")[:2] for line in sweep_table([*judges, *runs]).splitlines() if "**" in line]
    assert bold == [["| reward_model", "**0.2**"], ["| dpo", "**0.1**"]]


def test_the_members_of_a_seed_are_one_number_of_the_reward_models_interval():
    names = ("accuracy", "clean_accuracy", "ece", "clean_ece")
    judges = [
        {
            "arm": "reward_model",
            "seed": seed,
            "metrics": {**dict.fromkeys(names, value), "num_pairs": 10},
            "tokens": {"trained": 0},
            "cpu_seconds": 1,
        }
        for seed, value in ((0, 0.6), (0, 0.8), (1, 0.7))
    ]
    assert "| 0.700 ± 0.000 |" in judge_table(judges)


@pytest.mark.slow
def test_the_study_runs_and_takes_finished_runs_as_they_are(tmp_path, monkeypatch, capsys):
    arguments = ("--quick", "--seeds", "1", "--arms", "dpo", "ppo_sft", "--work", str(tmp_path))

    def table_of_a_run():
        out, _ = studied(preferences, *arguments, monkeypatch=monkeypatch, capsys=capsys)
        return [line for line in out.splitlines() if line.startswith("|")]

    first = table_of_a_run()
    assert [line.split(" | ")[0] for line in first] == [
        "| reward models", "| ---", "| reward_model", "| arm", "| ---", "| base", "| dpo", "| ppo_sft",
    ]  # fmt: skip
    # The table shows seconds, which no second run would repeat.
    assert table_of_a_run() == first
