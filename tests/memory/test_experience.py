"""The experience of a run: what is kept of each prompt, and which prompts come again."""

import json
import math
import random
from collections import Counter

import pytest
from memory_case import examples, texts, told, visit

from hybrid.core import InputError
from hybrid.memory import Experience, make_memory
from hybrid.memory.record import Record, bounds, class_of
from hybrid.memory.schedules import apportioned, by_learnability


def attached(number=10, **settings):
    memory = Experience(**{"uniform": 0.0, **settings})
    memory.attach(examples(number), seed=3)
    return memory


def test_the_first_visit_sets_the_means_and_later_ones_move_them_by_the_rate():
    memory = attached(rate=0.25)
    (one,) = examples(1)
    memory.visited([visit(one, 1.0, 0.0, 0.75, 0.0)], 1)
    (record,) = memory.records.values()
    assert (record.attempts, record.visits, record.success, record.score) == (4, 1, 0.5, 0.4375)
    memory.visited([visit(one, 1.0, 1.0, step=5)], 5)
    assert (record.attempts, record.visits, record.last_step, record.kl) == (6, 2, 5, 0.25)
    assert record.success == pytest.approx(0.5 + 0.25 * 0.5)
    assert record.score == pytest.approx(0.4375 + 0.25 * (1 - 0.4375))


def test_the_best_responses_are_kept_once_and_of_equal_ones_the_surer_first():
    memory = attached(keep=2)
    (one,) = examples(1)
    memory.visited([visit(one, 1.0, 1.0, 0.0, entropy=0.9)], 1)
    memory.visited([visit(one, 1.0, step=2, entropy=0.2)], 2)
    (record,) = memory.records.values()
    assert [(row.response[0], row.step, row.entropy) for row in record.best] == [(10, 2, 0.2), (11, 1, 0.9)]


@pytest.mark.parametrize(
    ("success", "name"), [(0.0, "hard"), (0.24, "hard"), (0.25, "medium"), (0.75, "medium"), (0.76, "easy")]
)
def test_the_thresholds_belong_to_the_medium_class(success, name):
    assert class_of(success, (0.25, 0.75)) == name


def test_quantiles_are_rates_of_the_prompts_themselves():
    assert bounds([0.9, 0.1, 0.5, 0.3, 0.7], [0.25, 0.75], "quantile") == (0.3, 0.7)
    assert bounds([0.9, 0.1], [0.25, 0.75], "fixed") == (0.25, 0.75)


def test_shares_become_counts_that_add_up():
    assert apportioned({"easy": 0.2, "medium": 0.6, "hard": 0.2}, 10) == {"easy": 2, "medium": 6, "hard": 2}
    assert apportioned({"easy": 0.5, "medium": 0.25, "hard": 0.25}, 3) == {"easy": 1, "medium": 1, "hard": 1}
    assert sum(apportioned({"easy": 1 / 3, "medium": 1 / 3, "hard": 1 / 3}, 16).values()) == 16


def test_each_class_gives_its_share_of_the_prompts():
    # 10 of each class; 20 prompts are asked for.
    scores = {i: [0.0, 0.0] if i < 10 else [0.0, 1.0] if i < 20 else [1.0, 1.0] for i in range(30)}
    memory = told(attached(30, choose="classes", shares={"easy": 0.1, "medium": 0.4, "hard": 0.5}), scores)
    picked = [int(text[1:]) // 10 for text in texts(memory.pick(examples(20), 2))]
    assert Counter(picked) == {0: 10, 1: 8, 2: 2}
    assert len(set(texts(memory.pick(examples(20), 2)))) == 20


def test_what_a_class_lacks_the_others_give():
    memory = told(attached(6, choose="classes"), {i: [0.0] for i in range(6)})
    assert sorted(texts(memory.pick(examples(6), 2))) == [f"p{i}" for i in range(6)]


def test_prompts_that_were_never_seen_come_first_as_the_loader_drew_them():
    memory = told(attached(6), {0: [1.0, 0.0], 1: [1.0, 0.0]})
    found = examples(6)
    assert texts(memory.pick([found[i] for i in (4, 0, 2)], 2))[:2] == ["p4", "p2"]
    assert texts(memory.pick([found[i] for i in (4, 0, 2)], 2))[2] in ("p3", "p5")


def test_at_a_share_they_leave_room_for_those_that_were_seen():
    memory = told(attached(8, unseen=0.25), {i: [1.0, 0.0] for i in range(4)})
    picked = texts(memory.pick(examples(8)[4:], 2))
    assert sum(text >= "p4" for text in picked) == 1 and len(set(picked)) == 4


def test_the_uniform_share_is_the_loaders():
    memory = told(attached(8, uniform=0.5), {i: [1.0, 0.0] if i > 5 else [1.0, 1.0] for i in range(8)})
    picked = texts(memory.pick(examples(8)[:4], 2))
    assert picked[:2] == ["p0", "p1"] and sorted(picked[2:]) == ["p6", "p7"]


def test_medium_difficulty_comes_first_and_no_variance_last():
    scores = {0: [0, 0, 0, 0, 0, 0, 0, 0], 1: [0, 0, 0, 0, 0, 0, 0, 1], 2: [0, 0, 1, 1], 3: [1, 1, 1, 1]}
    memory = told(attached(4), {i: [float(x) for x in s] for i, s in scores.items()})
    order = [texts(memory.pick(examples(4), step)) for step in range(2, 12)]
    assert {tuple(texts[:2]) for texts in order} == {("p2", "p1")}
    assert {frozenset(texts[2:]) for texts in order} == {frozenset({"p0", "p3"})}


def test_within_the_medium_range_the_draw_goes_by_p_times_1_minus_p():
    records = [Record("half", attempts=8, visits=1, success=0.5), Record("quarter", attempts=8, visits=1, success=0.25)]
    draws = 4000
    chance = random.Random(0)
    first = Counter(by_learnability(records, 1, (0.25, 0.75), chance)[0].key for _ in range(draws))
    # .25 against .1875: 4/7; four standard errors of a share of 4000 draws are .031.
    assert first["half"] / draws == pytest.approx(4 / 7, abs=0.031)


def test_the_draw_depends_on_the_seed_and_the_step_alone():
    scores = {i: [0.0, 1.0] for i in range(20)}
    one, same = (told(attached(20), scores) for _ in range(2))
    assert texts(one.pick(examples(8), 5)) == texts(same.pick(examples(8), 5))
    assert texts(one.pick(examples(8), 5)) != texts(one.pick(examples(8), 6))
    other = told(attached(20), scores)
    other.seed = 4
    assert texts(one.pick(examples(8), 5)) != texts(other.pick(examples(8), 5))


def test_beyond_the_capacity_the_prompt_seen_longest_ago_is_forgotten():
    memory = attached(capacity=2)
    found = examples(3)
    for step, i in enumerate((0, 1, 0, 2), start=1):
        memory.visited([visit(found[i], 1.0, step=step)], step)
    assert {record.text for record in memory.records.values()} == {"p0", "p2"}


def test_metrics_are_shares_of_the_runs_prompts():
    memory = told(attached(8), {0: [0.0], 1: [1.0], 2: [1.0], 3: [0.0, 1.0]})
    shares = {name: memory.metrics()[f"memory/{name}"] for name in ("easy", "medium", "hard", "unseen")}
    assert shares == {"easy": 0.25, "medium": 0.125, "hard": 0.125, "unseen": 0.5}
    assert memory.metrics()["memory/success"] == pytest.approx((0 + 1 + 1 + 0.5) / 4)


@pytest.mark.parametrize("settings", [{}, {"choose": "due"}, {"staleness": 3}], ids=str)
def test_its_state_as_json_makes_it_again(settings):
    memory = told(attached(6, **settings), {i: [0.0, i / 6] for i in range(5)}, step=4)
    other = attached(6, **settings)
    other.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    assert other == memory and other.records == memory.records and other.recent == memory.recent
    assert texts(other.pick(examples(6), 5)) == texts(memory.pick(examples(6), 5))
    fresh = attached(6, **settings)
    assert fresh.records != memory.records


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"capacity": 0}, r"memory\.capacity must be at least 1, got 0"),
        ({"keep": 0}, r"memory\.keep must be at least 1, got 0"),
        ({"shares": {"easy": 0.5, "medium": 0.6}}, r"memory\.shares must be at least 0 and add up to 1"),
        ({"shares": {"eazy": 1.0}}, r"unknown class of prompts: memory\.shares\. 'eazy'; did you mean 'easy'"),
        ({"thresholds": [0.8, 0.2]}, r"memory\.thresholds must be two numbers in \[0, 1\], the lower one first"),
        ({"thresholds": [0.5]}, r"memory\.thresholds must be two numbers"),
        ({"choose": "class"}, r"memory\.choose must be one of 'classes', 'learnability', 'due', got 'class'"),
        ({"chose": "due"}, r"memory\.chose: unknown parameter of memory 'experience': 'chose'; did you mean 'choose'"),
        ({"shares": {"easy": math.nan}}, r"memory\.shares must be at least 0 and add up to 1"),
        ({"shares": {}}, r"memory\.shares must be at least 0 and add up to 1"),
        ({"interval": 0}, r"memory\.interval must be > 0 steps"),
        ({"interval": math.inf}, r"memory\.interval must be > 0 steps and finite, got inf"),
        ({"success": math.nan}, r"memory\.success must be a finite score, got nan"),
        ({"uniform": 1.5}, r"memory\.uniform must lie in \[0, 1\]"),
        ({"staleness": -1}, r"memory\.staleness must be at least 0"),
    ],
    ids=str,
)
def test_bad_settings_are_told_by_name(settings, said):
    with pytest.raises(InputError, match=said):
        make_memory({"type": "experience", **settings})


def test_an_unknown_type_is_told_with_the_nearest():
    with pytest.raises(InputError, match="unknown memory 'experiense'; did you mean 'experience'"):
        make_memory({"type": "experiense"})
    with pytest.raises(InputError, match=r"memory\.type is missing; known: .*experience, markov"):
        make_memory({"choose": "due"})
    assert make_memory({}) is None
