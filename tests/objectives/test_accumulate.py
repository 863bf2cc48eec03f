"""The gradient of an update out of microbatches, and what happens where one does not fit into memory."""

import pytest
import torch

from hybrid.core import Encoded, RunStopped, microbatches
from hybrid.data import collate
from hybrid.objectives import GradientConfig, Term, Updater, update

VOCAB, WIDTH = 50, 16


def batch_of(*lengths):
    """Examples of so many tokens; the first of each predicts nothing before it."""
    ids = torch.arange(3, 3 + sum(lengths)).remainder(VOCAB).tolist()
    rows = [tuple(ids[sum(lengths[:i]) :][:n]) for i, n in enumerate(lengths)]
    return collate([Encoded(row, row, row[:1], "", "", {}) for row in rows], pad_id=0)


BATCH = batch_of(4, 9, 3, 7, 5, 8, 2, 6)


def test_metrics_of_microbatches_are_weighted_by_tokens_losses_added_maxima_kept():
    values = iter([(1.0, 10.0), (2.0, 30.0)])
    weight = torch.nn.Parameter(torch.zeros(()))
    module = torch.nn.Module()
    module.weight = weight

    def loss_of(_):
        loss, other = (torch.tensor(x) for x in next(values))
        return weight * 0 + loss, {"entropy": other, "ratio_max": other}

    batch = batch_of(7, 3)  # 6 and 2 trained tokens; the longest row comes first
    metrics = update(module, torch.optim.SGD([weight], lr=0.1), [Term("sft", batch, loss_of, microbatch_size=1)])
    assert metrics["loss"] == 3.0
    assert metrics["entropy"] == pytest.approx((6 * 10 + 2 * 30) / 8)
    assert metrics["ratio_max"] == 30.0


def on_cpu():
    torch.empty(2**50)  # a petabyte


def on_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")


class Machine:
    """An updater of a small network with dropout, whose forward runs out of memory on more than `room` rows."""

    def __init__(self, room, failing=on_cpu):
        torch.manual_seed(0)
        layers = torch.nn.Embedding(VOCAB, WIDTH), torch.nn.Dropout(0.5), torch.nn.Linear(WIDTH, VOCAB)
        self.module = torch.nn.Sequential(*layers)
        section = {"name": "adamw", "lr": 0.1}
        self.updater = Updater(self.module, section, {}, GradientConfig())
        self.room, self.failing = room, failing
        self.sizes = []  # of every microbatch that was tried

    def loss_of(self, batch):
        self.sizes.append(len(batch))
        loss = torch.nn.functional.cross_entropy(self.module(batch.input_ids).mT, batch.labels, reduction="sum") / 50
        if len(batch) > self.room:
            self.failing()
        return loss, {}

    def step(self, microbatch_size=None):
        torch.manual_seed(1)  # of the dropout
        return self.updater([Term("sft", BATCH, self.loss_of, microbatch_size=microbatch_size, section="sft")])

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])


@pytest.mark.parametrize("failing", [on_cpu, on_gpu])
def test_out_of_memory_gives_the_update_of_the_smaller_microbatch_bit_for_bit(failing):
    one, other = Machine(room=2, failing=failing), Machine(room=2)
    with pytest.warns(UserWarning) as told:
        metrics = one.step()
    expected = other.step(microbatch_size=2)
    assert one.sizes == [8, 4, 2, 2, 2, 2]
    assert "with 8 sft rows at a time; from here on 4" in str(told[0].message)
    assert "sft.microbatch_size=2" in str(told[1].message)
    assert metrics == expected
    assert torch.equal(one.weights(), other.weights())


def test_the_smaller_microbatch_holds_for_the_steps_that_follow():
    machine = Machine(room=4)
    with pytest.warns(UserWarning, match="out of memory"):
        machine.step()
    machine.sizes.clear()
    machine.step()
    assert machine.sizes == [4, 4]


def test_a_failure_after_another_terms_gradient_starts_both_anew():
    both = []
    for room, size in ((3, None), (8, 2)):
        machine = Machine(room)
        terms = [Term("ppo", BATCH, machine.loss_of, 0.5, 3), Term("sft", BATCH, machine.loss_of, 2.0, size)]
        if room == 3:
            with pytest.warns(UserWarning, match="out of memory"):
                machine.updater(terms)
        else:
            machine.updater(terms)
        both.append(machine)
    assert both[0].updater.row_limits == {"sft": 2}
    assert torch.equal(both[0].weights(), both[1].weights())


@pytest.mark.filterwarnings("ignore:out of memory")
def test_where_one_row_does_not_fit_the_run_stops_with_advice():
    machine = Machine(room=0, failing=on_gpu)
    before = machine.weights()
    with pytest.raises(RunStopped, match=r"one sft row at a time \(CUDA out of memory. Tried to allocate 2.00 GiB.\)"):
        machine.step()
    assert torch.equal(machine.weights(), before)


def test_any_other_error_is_let_through():
    def broken():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Machine(room=0, failing=broken).step()


@pytest.mark.filterwarnings("ignore:out of memory")
def test_the_failed_forward_holds_no_memory_when_the_next_begins():
    import weakref

    machine, alive = Machine(room=4), []
    loss_of = machine.loss_of

    def watched(batch):
        alive.append([ref() is not None for ref in refs])
        held = machine.module[0](batch.input_ids)
        refs.append(weakref.ref(held))
        return loss_of(batch)

    refs = []
    machine.updater([Term("sft", BATCH, watched)])
    assert alive[1] == [False]


def test_microbatches_hold_rows_of_like_length_and_lose_no_row():
    parts = microbatches(BATCH, 3)
    lengths = [part.attention_mask.sum(1).tolist() for part in parts]
    assert lengths == [[9, 8, 7], [6, 5, 4], [3, 2]]
    for part in parts:
        for ids, mask in zip(part.trimmed().input_ids, part.trimmed().attention_mask, strict=True):
            assert ids[mask].tolist() in [
                row[seen].tolist() for row, seen in zip(BATCH.input_ids, BATCH.attention_mask, strict=True)
            ]
        assert part.trimmed().input_ids.shape[1] == part.attention_mask.sum(1).max()
    assert sum(part.num_tokens for part in parts) == BATCH.num_tokens
