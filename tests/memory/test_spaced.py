"""Spaced repetition: when a prompt is due again."""

import sys
from itertools import pairwise

import pytest
from memory_case import examples, texts, told, visit

from hybrid.core import InputError
from hybrid.memory import Experience
from hybrid.memory.spaced import FSRS, Leitner


def due_after(scheduler, grades, card=None):
    """The steps at which a prompt comes again, each visit in the very step in which it is due."""
    step, found = 0, []
    for grade in grades:
        card = scheduler.reviewed(card, grade, step)
        step = round(card["due"])
        found.append(step)
    return found


def test_leitners_intervals_double_and_a_wrong_answer_begins_anew():
    assert due_after(Leitner(interval=2), [1, 1, 1, 0, 1, 1]) == [2, 6, 14, 16, 20, 28]


def test_what_is_due_longest_comes_first_then_what_will_be_soonest():
    memory = Experience(choose="due", uniform=0.0)
    memory.attach(examples(4))
    found = examples(4)
    # Boxes 1, 2, 1, 3: due at 6, 7, 2, 9.
    for step, number, score in [
        (1, 1, 1.0),
        (1, 3, 1.0),
        (1, 2, 0.0),
        (3, 3, 1.0),
        (5, 1, 1.0),
        (5, 0, 1.0),
        (5, 3, 1.0),
    ]:
        memory.visited([visit(found[number], score, step=step)], step)
    assert texts(memory.pick(found, 6)) == ["p2", "p0", "p1", "p3"]


def test_fsrs_spaces_right_answers_further_and_further_and_forgets_the_wrong_ones_interval():
    pytest.importorskip("fsrs")
    right = due_after(FSRS(), [1.0] * 5)
    gaps = [b - a for a, b in pairwise(right)]
    assert gaps == sorted(gaps) and gaps[-1] > 3 * gaps[0]
    card = FSRS().reviewed(FSRS().reviewed(None, 1.0, 0), 0.0, 8)
    assert card["due"] - 8 < right[0]


def test_fsrs_is_a_function_of_the_steps_alone():
    pytest.importorskip("fsrs")
    assert FSRS(2.0).reviewed(None, 0.6, 4) == FSRS(2.0).reviewed(None, 0.6, 4)
    cards = [told(Experience(choose="due", scheduler="fsrs"), {0: [s]}).records for s in (0.0, 0.3, 0.6, 1.0)]
    dues = [next(iter(records.values())).card["due"] for records in cards]
    # One response of .3 is no success, as 0 is none.
    assert dues[0] == dues[1] < dues[2] == dues[3]


def test_fsrs_that_is_not_there_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsrs", None)
    with pytest.raises(InputError, match=r"needs fsrs, which is not installed: pip install 'hybrid-trainer\[memory\]'"):
        Experience(choose="due", scheduler="fsrs")
    Experience(choose="classes", scheduler="fsrs")
