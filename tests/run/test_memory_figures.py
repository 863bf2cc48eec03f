"""The figures of a run's memory: what they are drawn of, and that runs without one have none."""

import json

import pytest

from hybrid.run.memory_figures import memory_figures

SHARES = [(0.0, 0.25, 0.25, 0.5), (0.5, 0.25, 0.25, 0.0)]


def rows_of(shares):
    names = ("easy", "medium", "hard", "unseen")
    steps = [
        {"step": step, "phase": "ppo"} | {f"memory/{name}": x for name, x in zip(names, each, strict=True)}
        for step, each in enumerate(shares, start=1)
    ]
    return {"sft": [], "ppo": steps, "joint": [], "eval": []}


def test_class_shares_are_said_as_they_are_at_the_end(tmp_path):
    (figure,) = memory_figures(tmp_path, rows_of(SHARES))
    assert figure.description.endswith("at step 2 easy 50%, medium 25%, hard 25%, unseen 0%.")
    assert "var(--up)" in figure.svg and "medium" in figure.svg and ">unseen<" not in figure.svg


def test_a_run_without_a_memory_or_with_one_step_has_none(tmp_path):
    assert memory_figures(tmp_path, {"sft": [], "ppo": [{"step": 1}, {"step": 2}], "joint": [], "eval": []}) == []
    assert memory_figures(tmp_path, rows_of(SHARES[:1])) == []


@pytest.fixture
def chain(tmp_path):
    states = [{"state": name, "text": f"prompt {name}"} for name in "abc"]
    pairs = [{"from": "a", "to": "b", "worth": 1.0}, {"from": "b", "to": "c", "worth": 0.2}]
    lines = [{"memory": "markov", "tokenizer": None, "step": 1}, *states, *pairs]
    (tmp_path / "memory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_chain_is_drawn_with_a_cell_for_each_pair_that_was_followed(chain):
    (figure,) = memory_figures(chain, rows_of(SHARES[:1]))
    assert figure.description.endswith("2 of 9 pairs were followed, 2 in all.")
    assert figure.svg.count("fill: var(--ppo)") == 2 and "prompt a" in figure.svg


def test_an_experience_is_no_chain(tmp_path):
    (tmp_path / "memory.jsonl").write_text('{"memory": "experience", "tokenizer": null, "step": 1}\n{"key": "a"}\n')
    assert memory_figures(tmp_path, rows_of(SHARES[:1])) == []
