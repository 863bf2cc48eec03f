"""The memory beside a cell: the papers' formulas, and what they are for."""

import recurrent_loops
import torch

from hybrid.models.recurrent.memory_slots import (
    Memory,
    addressed,
    cosine,
    empty_memory,
    interface_size,
    memory_step,
    started,
)

WIDTH, SLOTS = 3, 5
STAY = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)


def numbers(rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, interface_size(WIDTH), generator=generator, dtype=torch.float64)


def blank(rows=2):
    return empty_memory(rows, SLOTS, WIDTH, torch.zeros((), dtype=torch.float64))


def lookup(slots, **changes):
    one = torch.ones(1, 1, dtype=torch.float64)
    given = {"key": slots[:, 2], "strength": 50 * one, "gate": one, "shift": STAY, "sharpness": one} | changes
    before = torch.zeros(1, SLOTS, dtype=torch.float64)
    before[0, 4] = 1
    return addressed(slots, before, **given)


def filled():
    slots = torch.zeros(1, SLOTS, WIDTH, dtype=torch.float64)
    slots[0, :3] = torch.eye(3)
    return slots


def test_steps_are_the_papers_formulas_a_number_at_a_time():
    memory, slow = blank(), [([[0.0] * WIDTH] * SLOTS, *[[1.0] + [0.0] * (SLOTS - 1)] * 2, [0.0] * WIDTH)] * 2
    for step in range(4):
        given = numbers(seed=step)
        memory = memory_step(given, memory)
        slow = [recurrent_loops.memory(given[b].tolist(), *slow[b][:3]) for b in range(2)]
        for b in range(2):
            for ours, theirs in zip(memory, slow[b], strict=True):
                torch.testing.assert_close(ours[b], torch.tensor(theirs, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert memory.slots.abs().max() > 0.1 and memory.read.std() > 0.01


def test_weights_sum_to_one_and_have_a_gradient_from_the_first_step():
    given = numbers().requires_grad_()
    memory = memory_step(given, blank())
    torch.testing.assert_close(memory.read.sum(1), torch.ones(2, dtype=torch.float64))
    memory.value.square().sum().backward()
    assert given.grad.isfinite().all() and given.grad.abs().max() > 0


def test_a_key_finds_the_slot_that_is_like_it():
    assert lookup(filled()).argmax() == 2
    assert lookup(filled())[0, 2] > 0.999
    assert lookup(filled(), gate=torch.zeros(1, 1, dtype=torch.float64)).argmax() == 4  # where the head was


def test_a_shift_goes_to_the_neighbour_and_around():
    up, down = STAY.roll(1, 1), STAY.roll(-1, 1)
    assert lookup(filled(), shift=up).argmax() == 3
    assert lookup(filled(), shift=down).argmax() == 1
    stays = torch.zeros(1, 1, dtype=torch.float64)
    assert lookup(filled(), gate=stays, shift=up).argmax() == 0


def test_an_empty_slot_is_like_no_key():
    similar = cosine(torch.ones(1, WIDTH, dtype=torch.float64), filled())
    assert similar[0, 3:].eq(0).all()
    torch.testing.assert_close(similar[0, :3], torch.full((3,), 3**-0.5, dtype=torch.float64), rtol=1e-3, atol=0)


def test_a_closed_gate_writes_nothing_and_an_open_one_does():
    given = numbers()
    held = Memory(torch.randn(2, SLOTS, WIDTH, dtype=torch.float64), *blank()[1:])
    given[:, -1] = -50
    torch.testing.assert_close(memory_step(given, held).slots, held.slots)
    given[:, -1] = 50
    assert not torch.allclose(memory_step(given, held).slots, held.slots, atol=1e-2)


def test_heads_begin_as_a_tape_that_is_looked_up_by_content():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(interface_size(8), 6, generator=generator, dtype=torch.float64)
    states = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    weight, bias = started(weight)
    memory, last = empty_memory(1, 7, 8, bias), None
    for state in states:
        memory = memory_step((weight @ state * 0.1 + bias).unsqueeze(0), memory)
        assert last is None or memory.write.argmax() == last + 1  # on by one slot a token
        last = int(memory.write.argmax())
    assert last == 4
    # The key is what is added: a state finds the slot that was written in one like it.
    assert torch.equal(weight[:8], weight[3 * 8 + 12 : 4 * 8 + 12])
    slots = memory.slots[0, 1:5]
    alike = torch.nn.functional.cosine_similarity((weight[:8] @ states.T).T.unsqueeze(1), slots.unsqueeze(0), dim=2)
    assert alike.argmax(1).tolist() == [0, 1, 2, 3]
