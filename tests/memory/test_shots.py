"""Past good answers in front of a prompt: which, in what order, as which tokens."""

from dataclasses import replace

import pytest
import torch
from memory_case import examples, numbers, told

from hybrid.core import InputError
from hybrid.memory import Kept, example_key, make_memory
from hybrid.memory.shots import Nearness, shot_ids, vectors_of, with_shots

EMBEDDER = "memory_case:numbers"
SPEC = {"type": "experience", "shots": 2, "embedder": EMBEDDER}


def kept(prompt, response, num_shots=0):
    return Kept(tuple(prompt), tuple(response), None, 1.0, 0.0, 1, True, num_shots=num_shots)


def of_text(*prompts):
    return [tuple(x) for x in numbers(prompts)]


def test_the_nearest_come_first_by_the_cosine():
    near = Nearness(EMBEDDER)
    others = {"a": "p9", "b": "p4", "c": "p0", "d": "p7"}
    assert near.nearest("p5", others, 3) == ["b", "d", "a"]
    assert near.nearest("p5", {}, 3) == []
    assert near.nearest("p5", others, 9) == ["b", "d", "a", "c"]


def test_each_text_is_embedded_once_and_alone(monkeypatch):
    asked = []
    monkeypatch.setattr("memory_case.numbers", lambda texts: asked.append(texts) or of_text(*texts))
    near = Nearness(EMBEDDER)
    for _ in range(2):
        near.nearest("p5", {"a": "p9", "b": "p4"}, 1)
    assert sorted(asked) == [["p4"], ["p5"], ["p9"]]


def test_an_embedder_that_gives_no_vector_is_told_by_name(monkeypatch):
    monkeypatch.setattr("memory_case.numbers", lambda texts: [0.0])
    with pytest.raises(InputError, match=r"memory.embedder 'memory_case:numbers' must give each of 1 texts a vector"):
        vectors_of(["p"], EMBEDDER)


def test_the_nearest_answer_stands_next_to_the_prompt_and_nothing_of_it_is_trained():
    (example,) = examples(1)
    shown = with_shots(example, [kept([5], [6, 2]), kept([7, 8], [9, 2])], room=20)
    assert shown.prompt_ids == (7, 8, 9, 2, 5, 6, 2, *example.prompt_ids)
    assert shown.input_ids == (7, 8, 9, 2, 5, 6, 2, *example.input_ids)
    assert shown.labels == (-100,) * 7 + example.labels
    assert (shown.num_shots, shown.prompt, shown.target) == (7, example.prompt, example.target)
    assert example_key(shown) == example_key(example)


def test_a_hint_behind_the_prompt_and_shots_before_it_change_no_key():
    (example,) = examples(1)
    shown = with_shots(example, [kept([5], [6, 2])], room=20)
    hinted = replace(shown, prompt_ids=(*shown.prompt_ids, 50), num_hint=1)
    assert example_key(hinted) == example_key(example)


def test_what_does_not_fit_is_left_out_and_what_does_comes_instead():
    (example,) = examples(1)
    answers = [kept([5], [6, 2]), kept([7] * 9, [9, 2]), kept([4], [2])]
    assert with_shots(example, answers, room=5).prompt_ids == (4, 2, 5, 6, 2, *example.prompt_ids)
    assert with_shots(example, answers, room=1) is example


def test_both_sides_of_a_pair_stand_behind_the_same_shots():
    first, second = examples(2)
    shown = with_shots(replace(first, rejected=second), [kept([5], [6, 2])], room=9)
    assert shown.rejected.input_ids == (5, 6, 2, *second.input_ids)
    assert shown.rejected.prompt_ids == (5, 6, 2, *second.prompt_ids)


def test_an_answer_that_was_given_behind_shots_is_shown_without_them():
    assert shot_ids(kept([1, 2, 3, 4], [9], num_shots=3)) == (4, 9)


def test_an_answer_that_was_cut_off_gets_the_eos_that_others_have():
    assert shot_ids(kept([1], [9]), 2) == (1, 9, 2)
    assert shot_ids(kept([1], [9, 2]), 2) == (1, 9, 2)


def shown_by(memory, number):
    found = examples(number + 1)
    return memory.shown([found[number]])[0]


def test_the_memory_shows_the_best_answers_to_the_nearest_prompts_that_are_good():
    memory = told(make_memory(SPEC), {0: [1.0], 1: [0.2, 0.9], 2: [0.1], 4: [1.0]})
    # Of p3: p4 and p2 are nearest, and p2 has no good answer, so p1's best, its second, is the other.
    shown = shown_by(memory, 3)
    assert shown.prompt_ids == (3, 4, 11, 2, 3, 7, 10, 2, 3, 6)
    # A prompt is not shown its own answer.
    assert shown_by(memory, 4).prompt_ids == (3, 3, 10, 2, 3, 4, 11, 2, 3, 7)


def test_what_is_picked_is_shown_and_without_shots_stays_as_it_is():
    plain, memory = told(make_memory({"type": "experience"}), {0: [1.0]}), told(make_memory(SPEC), {0: [1.0]})
    for one in (plain, memory):
        one.attach(examples(3))
    drawn = examples(3)[1:]
    assert plain.pick(drawn, 2) == plain.shown(plain.pick(drawn, 2))
    assert all(e.num_shots == 0 for e in plain.pick(drawn, 2))
    assert [e.num_shots for e in memory.pick(drawn, 2)] == [4, 4]
    assert (plain.most_added, memory.most_added) == (0, 256)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shots": 2}, "shots and embedder go together, got 2 and None"),
        ({"embedder": EMBEDDER}, "shots and embedder go together, got 0"),
        ({"shots": -1, "embedder": EMBEDDER}, "memory.shots must be at least 0, got -1"),
        ({**SPEC, "shots_tokens": -1}, "memory.shots_tokens must be at least 0"),
    ],
)
def test_bad_settings_are_told_by_name(settings, said):
    with pytest.raises(InputError, match=said):
        make_memory({"type": "experience", **settings})


def test_vectors_are_numbers_of_any_kind(monkeypatch):
    monkeypatch.setattr("memory_case.numbers", lambda texts: torch.ones(len(texts), 3, dtype=torch.float16))
    assert vectors_of(["a", "b"], EMBEDDER).dtype == torch.float64
