"""Weights that are gathered are gathered once, and let go of by the block that gathered them."""

from contextlib import contextmanager

from hybrid.distributed.processes import Processes


class Counting(Processes):
    def __init__(self):
        self._holds_all, self.gathers, self.held = False, 0, False

    @contextmanager
    def _gathering(self):
        self.gathers, self.held = self.gathers + 1, True
        yield
        self.held = False


def test_a_block_inside_another_neither_gathers_nor_lets_go():
    world = Counting()
    with world.gathered():
        with world.gathered():
            pass
        assert world.held
    assert not world.held
    with world.gathered():
        assert world.held
    assert world.gathers == 2
