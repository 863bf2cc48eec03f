"""Tests of hybrid.data.pack."""

import pytest
import torch
from tiny import tiny_model

from hybrid.core import IGNORE, Encoded, InputError
from hybrid.data import collate, left_pad, pack
from hybrid.models import Policy


def example(*ids, prompt=0):
    return Encoded(ids, (IGNORE,) * prompt + ids[prompt:], ids[:prompt], "", "", {})


def test_collate_pads_on_the_right():
    batch = collate([example(5, 6, 7, prompt=1), example(8, 9)], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.attention_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.labels.tolist() == [[IGNORE, 6, 7], [8, 9, IGNORE]]
    assert batch.position_ids is None


def test_an_eos_that_is_the_pad_token_is_neither_masked_nor_ignored():
    eos = 2
    batch = collate([example(5, 6, eos), example(7, eos)], pad_id=eos)
    assert batch.attention_mask.sum(1).tolist() == [3, 2]
    assert [row[row != IGNORE].tolist() for row in batch.labels] == [[5, 6, eos], [7, eos]]


def test_packing_numbers_segments_and_restarts_positions():
    batch = pack([example(1, 2), example(3, 4, 5), example(6, 7, 8, 9)], max_length=5, pad_id=0)
    assert batch.input_ids.tolist() == [[6, 7, 8, 9, 0], [3, 4, 5, 1, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]


def test_no_packed_label_is_predicted_from_another_example():
    batch = pack([example(1, 2), example(3, 4, 5)], max_length=5, pad_id=0)
    assert batch.labels.tolist() == [[IGNORE, 4, 5, IGNORE, 2]]


def test_packing_keeps_the_number_of_trained_tokens():
    examples = [example(*range(1, 2 + n), prompt=n % 3) for n in range(1, 12)]
    packed = pack(examples, max_length=16, pad_id=0)
    assert packed.num_tokens == collate(examples, pad_id=0).num_tokens
    assert packed.input_ids.shape[1] <= 16


def test_packed_examples_stand_in_the_order_of_the_rows():
    examples = [example(*range(10 * n, 10 * n + n)) for n in range(1, 6)]
    batch = pack(examples, max_length=7, pad_id=0)
    flat = batch.input_ids[batch.attention_mask > 0].tolist()
    assert flat == [token for e in batch.examples for token in e.input_ids]


def test_an_example_longer_than_a_packed_row_is_refused():
    with pytest.raises(InputError, match="3 tokens does not fit a packed row of 2"):
        pack([example(1, 2, 3)], max_length=2, pad_id=0)


def test_a_packed_row_gives_each_example_its_own_log_probs():
    policy = Policy(tiny_model())
    examples = [example(5, 6, 7, 8), example(9, 10, 11), example(12, 13)]
    packed, alone = pack(examples, max_length=16, pad_id=0), collate(examples, pad_id=0)

    def logprobs(batch):
        with torch.no_grad():
            logprob, trained = policy.batch_logprob(batch)
        return logprob[trained]

    # Float32 sums in another order.
    torch.testing.assert_close(logprobs(packed), logprobs(alone), atol=1e-5, rtol=1e-5)


def test_left_padded_prompts_all_end_at_the_last_column():
    ids, mask = left_pad([(5, 6, 7), (8,)], pad_id=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


def test_a_prompt_that_holds_the_pad_token_is_not_masked():
    _, mask = left_pad([(0, 0), (0,)], pad_id=0)
    assert mask.tolist() == [[True, True], [False, True]]


def test_a_prompt_without_a_token_is_refused():
    with pytest.raises(InputError, match="no token"):
        left_pad([(5,), ()], pad_id=0)


@pytest.mark.parametrize("call", [lambda: collate([], pad_id=0), lambda: pack([], max_length=4, pad_id=0)])
def test_an_empty_batch_is_refused(call):
    with pytest.raises(InputError, match="at least one example"):
        call()
