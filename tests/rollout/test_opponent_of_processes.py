"""Of several processes the first one alone asks an opponent: it may wait for no other."""

import pytest
from tiny import tiny_model

from hybrid import Policy
from hybrid.distributed import ALONE, World
from hybrid.rollout import PastPolicy, TorchEngine


@pytest.mark.parametrize("taken", [False, True])
def test_an_opponent_draws_alone(taken):
    world = World()
    world.size = 2
    policy = Policy(tiny_model())
    opponent = PastPolicy(policy, TorchEngine(policy, None, world))
    if taken:
        opponent.take()
    with opponent.engine() as engine:
        assert engine.world is ALONE
