"""Tests of hybrid.data.loader."""

from itertools import islice

import pytest

from hybrid.core import Encoded, InputError
from hybrid.data import Loader


def examples(count):
    return [Encoded((i, i), (i, i), (i,), "", "", {}) for i in range(count)]


def loader(count=10, batch_size=4, *, seed=0, **kwargs):
    return Loader(examples(count), batch_size, seed=seed, pad_id=0, **kwargs)


def drawn(batches, num_batches):
    """The examples of some batches, by number."""
    return [e.input_ids[0] for batch in islice(batches, num_batches) for e in batch.examples]


def test_every_epoch_draws_every_example_once():
    order = drawn(loader(10, 4), 5)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))


def test_epochs_have_different_orders():
    order = drawn(loader(10, 5), 4)
    assert order[:10] != order[10:]


def test_the_next_seed_does_not_repeat_this_ones_next_epoch():
    assert drawn(loader(10, 5, seed=0), 4)[10:] != drawn(loader(10, 5, seed=1), 2)


def test_without_shuffling_the_order_is_the_datas():
    assert drawn(loader(3, 2, shuffle=False), 3) == [0, 1, 2, 0, 1, 2]


def test_every_batch_is_full_even_where_it_straddles_epochs():
    assert [len(batch) for batch in islice(loader(10, 4), 6)] == [4] * 6


def test_a_batch_larger_than_the_data_wraps_around():
    order = drawn(loader(3, 7), 1)
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2]


def test_a_resumed_loader_continues_the_uninterrupted_one():
    whole = drawn(loader(), 9)
    interrupted = loader()
    first = drawn(interrupted, 4)
    resumed = loader()
    resumed.load_state_dict(interrupted.state_dict())
    assert first + drawn(resumed, 5) == whole


def test_the_state_is_the_number_of_samples_drawn():
    batches = loader(10, 4)
    next(batches)
    assert batches.state_dict() == {"position": 4}


def test_the_epoch_counts_full_passes():
    batches = loader(10, 5)
    epochs = [batches.epoch for _ in islice(batches, 4)]
    assert epochs == [0, 1, 1, 2]


def test_the_length_is_the_batches_that_cover_an_epoch():
    assert [len(loader(10, n)) for n in (1, 4, 5, 11)] == [10, 3, 2, 1]


def test_packing_puts_a_batchs_examples_into_fewer_rows():
    batch = next(loader(10, 4, packing_length=4))
    assert len(batch) == 2
    assert len(batch.examples) == 4


@pytest.mark.parametrize("kwargs", [{"count": 0}, {"batch_size": 0}])
def test_what_gives_no_batch_is_refused(kwargs):
    with pytest.raises(InputError, match=r"at least one example|batch_size"):
        loader(**kwargs)


def test_a_batch_that_no_memory_holds_is_refused():
    with pytest.raises(InputError, match="batch_size must be at most 1,000,000, got 10,000,000,000"):
        loader(batch_size=10**10)
