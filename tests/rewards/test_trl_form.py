"""Reward functions as TRL's GRPOTrainer takes them, and `async def` of every form."""

import asyncio
import logging
import math
import time

import pytest

from hybrid import HybridConfig, HybridTrainer
from hybrid.core import InputError
from hybrid.rewards import RewardError, RewardTimeout, make_reward

ROWS = [{"prompt": "p", "ground_truth": "4", "level": 1}, {"prompt": "q", "ground_truth": "5"}]
DIALOGUE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def accuracy(completions, ground_truth, **kwargs):
    return [float(c == t) for c, t in zip(completions, ground_truth, strict=True)]


async def slow_accuracy(prompts, completions, ground_truth, **kwargs):
    await asyncio.sleep(0)
    return accuracy(completions, ground_truth)


@pytest.mark.parametrize("function", [accuracy, slow_accuracy])
def test_a_column_of_the_rows_comes_by_its_name(function):
    assert make_reward(function).score(["4", "4"], items=ROWS) == [1, 0]


def test_all_columns_but_the_prompt_come_as_keywords():
    seen = {}

    def look(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * len(completions)

    make_reward(look).score(["a", "b"], ["t", "u"], ["p", "q"], ROWS)
    assert seen == {
        "prompts": ["p", "q"], "completions": ["a", "b"], "ground_truth": ["4", "5"], "level": [1, None],
        "target": ["t", "u"], "targets": ["t", "u"],
    }  # fmt: skip


@pytest.mark.parametrize("item", [{"messages": DIALOGUE}, {"prompt": DIALOGUE[:1]}])
def test_of_dialogues_prompts_and_completions_are_messages(item):
    def reward(prompts, completions, **columns):
        assert prompts == [DIALOGUE[:1]]
        return [float(len(completion[0]["content"])) for completion in completions]

    assert make_reward(reward).score(["abc"], items=[item]) == [3]


def test_none_says_that_a_reward_does_not_apply():
    def even_only(completions, **kwargs):
        return [float(text) if int(text) % 2 == 0 else None for text in completions]

    output = make_reward(even_only).score(["2", "3"])
    assert output[0] == 2 and math.isnan(output[1]) and output.valid.tolist() == [True, False]
    assert output.parts["even_only"].counts["skipped"] == 1
    both = make_reward({"type": "weighted_sum", "components": [even_only, {"type": "length_window", "min": 1}]})
    assert both.score(["2", "3"]) == [1.5, 1]


def test_none_of_a_function_of_ours_is_still_refused():
    for function in (lambda responses: [None], lambda response: None):
        with pytest.raises(RewardError, match="returned None"):
            make_reward(function)("a")


@pytest.mark.parametrize("name", ["completion_ids", "trainer_state", "log_extra", "log_metric"])
def test_what_only_trls_trainer_has_is_refused_unless_it_has_a_default(name):
    scope = {}
    exec(f"def needs(completions, {name}): pass\ndef may(completions, {name}=None): return [1.0]", scope)
    with pytest.raises(InputError, match=f"needs {name}, which only TRL's trainer gives"):
        make_reward(scope["needs"])
    assert make_reward(scope["may"])("a") == 1


def test_a_column_that_no_row_has_is_refused_before_a_model_is_looked_for():
    message = (
        "'accuracy' needs the column 'ground_truth', which none of the 1 training examples has: they have prompt, x"
    )
    with pytest.raises(InputError, match=message):
        HybridTrainer("/no/such/model", train_data=[{"prompt": "a", "x": "b"}], reward=accuracy, config=HybridConfig())


def test_a_function_that_names_a_target_is_warned_for_where_there_is_none(caplog):
    reward = make_reward(lambda response, target: 1.0)
    with caplog.at_level(logging.WARNING):
        reward.check_data(["", None], [{}, {}], what="rows", hint="add one")
    assert 'names a target, and none of the 2 rows has one: it gets ""' in caplog.text


def test_batch_false_contradicts_completions():
    with pytest.raises(InputError, match="takes lists"):
        make_reward({"type": "python", "function": accuracy, "batch": False})


async def patient(response):
    if response == "hangs":
        await asyncio.sleep(1e9)
    if response == "raises":
        raise KeyError("missing")
    await asyncio.sleep(0.05)
    return len(response)


class Awaitable:
    async def __call__(self, response):
        return await patient(response)


def test_async_calls_of_one_sample_run_at_once():
    began = time.perf_counter()
    assert make_reward(patient).score(["a" * n for n in range(16)]) == list(range(16))
    assert time.perf_counter() - began < 16 * 0.05 / 2


def test_max_concurrency_bounds_them():
    running, most = 0, 0

    async def count(response):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return 1.0

    make_reward({"type": "python", "function": count, "max_concurrency": 3}).score([str(i) for i in range(9)])
    assert most == 3


def test_an_async_callable_object_is_awaited():
    assert make_reward(Awaitable())("abc") == 3


def test_errors_and_timeouts_are_the_samples_own():
    settings = {"type": "python", "function": patient, "timeout": 0.3, "on_error": "value", "error_value": -1}
    output = make_reward(settings).score(["a", "hangs", "raises", "bb"])
    assert output == [1, -1, -1, 2]
    assert output.parts["python"].counts["timeouts"] == 1


def test_a_batch_that_takes_too_long_is_a_timeout():
    async def hangs(completions):
        await asyncio.sleep(1e9)

    with pytest.raises(RewardTimeout, match=r"it took longer than timeout \(0.05 s\)"):
        make_reward({"type": "python", "function": hangs, "timeout": 0.05}).score(["a", "b"])


def test_async_rewards_work_inside_a_running_loop_and_inside_each_other():
    inner = make_reward(patient)

    async def outer(response):
        return inner(response) + 1

    async def notebook():
        return make_reward(outer).score(["a", "bb"])

    assert asyncio.run(notebook()) == [2, 3]


def test_what_an_async_function_keeps_between_calls_stays_usable():
    kept = {}

    async def reward(response):
        kept.setdefault("lock", asyncio.Lock())
        kept.setdefault("loop", asyncio.get_running_loop())
        async with kept["lock"]:
            return float(kept["loop"] is asyncio.get_running_loop())

    function = make_reward(reward)
    assert [function("a"), function("b")] == [1, 1]


@pytest.mark.parametrize("name", ["trl", "later"])
def test_an_isolated_function_may_be_of_either_kind(tmp_path, monkeypatch, name):
    (tmp_path / "isolated_trl.py").write_text(
        "def trl(completions, level, **kwargs):\n    return [None if l is None else l for l in level]\n"
        "async def later(completions, level):\n    return [None if l is None else l for l in level]\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = make_reward({"type": "python", "function": f"isolated_trl:{name}", "isolate": True})
    output = reward.score(["a", "b"], items=ROWS)
    assert output[0] == 1 and output.valid.tolist() == [True, False]
    with pytest.raises(InputError, match="needs the column 'level'"):
        reward.check_data(["t"], [{"prompt": "p"}], what="rows", hint="")
