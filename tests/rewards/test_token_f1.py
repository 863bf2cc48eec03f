"""Word F1 by hand, and against an independent reading of how SQuAD scores answers."""

import random
import re
import string

import pytest

from hybrid.rewards import make_reward


@pytest.mark.parametrize(
    ("response", "target", "expected"),
    [
        ("a red house", "The red car", 1 / 2),
        ("Paris!", "paris", 1),
        ("no no no", "no", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("house", "car", 0),
        ("", "car", 0),
        ("", "", 0),
        ("the", "the", 1),
        ("the", "an", 0),
        ("don't", "dont", 1),
        ("banana", "an", 0),
    ],
)
def test_word_f1_by_hand(response, target, expected):
    assert make_reward({"type": "token_f1"})(response, target) == pytest.approx(expected)


def test_word_f1_is_precision_and_recall_over_matched_words():
    def reference(response, target):
        ours, theirs = (
            re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in text.lower() if c not in string.punctuation)).split()
            for text in (response, target)
        )
        left, shared = list(theirs), 0
        for word in ours:
            if word in left:
                left.remove(word)
                shared += 1
        if not shared:
            return 0.0
        precision, recall = shared / len(ours), shared / len(theirs)
        return 2 * precision * recall / (precision + recall)

    draw = random.Random(0)
    words = ["The", "cat,", "sat", "on", "a", "mat.", "Cat", "SAT"]
    reward = make_reward({"type": "token_f1"})
    for _ in range(200):
        one, other = (" ".join(draw.choices(words, k=draw.randint(3, 9))) + " dog" for _ in range(2))
        assert reward(one, other) == pytest.approx(reference(one, other))
