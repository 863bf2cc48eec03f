"""What tests of memories share: examples of one prompt each, and visits to them."""

import math
import re

from hybrid.core import Encoded
from hybrid.memory import Kept, Visit, example_key


def examples(number):
    """Examples whose prompts are [3, 0], [3, 1], ... and whose texts are p0, p1, ..."""
    return [Encoded((3, 3 + i, 2), (-100, -100, 2), (3, 3 + i), f"p{i}", "t", {}) for i in range(number)]


def visit(example, *scores, step=1, entropy=0.5):
    """A visit with so many responses: the i-th has the tokens [10 + i, 2]."""
    rows = [Kept(example.prompt_ids, (10 + i, 2), (-0.5, -0.1), s, entropy, step, True) for i, s in enumerate(scores)]
    return Visit(example_key(example), example.prompt, tuple(rows), kl=0.25)


def told(memory, scores, *, step=1):
    """The memory, which has been told of a visit to each prompt: scores by number of the example."""
    found = examples(max(scores) + 1)
    memory.step = step
    memory.visited([visit(found[i], *s, step=step) for i, s in scores.items()], step)
    return memory


def numbers(prompts):
    """An embedder: two prompts are the nearer the nearer the numbers in them are."""
    found = [sum(int(digits) for digits in re.findall(r"\d+", prompt)) for prompt in prompts]
    return [[math.cos(n / 20), math.sin(n / 20)] for n in found]


def texts(picked):
    return [example.prompt for example in picked]
