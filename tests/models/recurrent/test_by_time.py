"""The layout of rows by time."""

import torch

from hybrid.models.recurrent.by_time import by_time


def sequences(mask):
    """The (row, column) of every sequence's tokens, in order, by the sequence's number."""
    where, found, start = by_time(mask), {}, 0
    for size in where.batch_sizes.tolist():
        for number in range(size):
            place = int(where.rows[start + number]), int(where.columns[start + number])
            found.setdefault(number, []).append(place)
        start += size
    return found, where


def test_rows_are_sequences_the_longest_first_wherever_the_padding_is():
    found, where = sequences(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1]]))
    assert found == {0: [(1, 0), (1, 1), (1, 2), (1, 3)], 1: [(0, 2), (0, 3)], 2: [(2, 0), (2, 3)]}
    assert where.begins.tolist() == [1, 0, 2] and where.ends.tolist() == [1, 0, 2]
    assert where.batch_sizes.tolist() == [3, 3, 1, 1]


def test_segments_are_sequences_and_only_number_one_goes_on():
    found, where = sequences(torch.tensor([[1, 2, 2, 2, 3, 0], [2, 2, 3, 3, 3, 3]]))
    assert found[0] == [(1, 2), (1, 3), (1, 4), (1, 5)]
    begins = {tuple(places[0]): int(where.begins[number]) for number, places in found.items()}
    assert begins == {(0, 0): 0, (0, 1): 2, (0, 4): 2, (1, 0): 2, (1, 2): 2}
    assert [found[int(number)][-1] for number in where.ends] == [(0, 4), (1, 5)]


def test_a_row_without_a_token_keeps_its_state():
    _, where = sequences(torch.tensor([[0, 0], [1, 1]]))
    assert where.ends.tolist() == [1 + 0, 0]
    none = by_time(torch.zeros(2, 3, dtype=torch.bool))
    assert none.ends.tolist() == [0, 1] and len(none.rows) == 0
