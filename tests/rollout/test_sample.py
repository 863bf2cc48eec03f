"""Sampling: the distribution drawn from, where responses end, and what the mask says."""

import pytest
import torch
from tiny import tiny_model

from hybrid.data import left_pad
from hybrid.models import Backbone
from hybrid.rollout import SamplingConfig, sample

EOS = 2


@pytest.fixture(scope="module")
def backbone():
    return Backbone(tiny_model("llama")).eval()


def draw(backbone, prompts, seed=0, pad_id=0, **config):
    ids, mask = left_pad(prompts, pad_id=pad_id)
    generator = torch.Generator().manual_seed(seed)
    return sample(backbone, ids, mask, SamplingConfig(**config), eos_ids=[EOS], pad_id=pad_id, generator=generator)


def test_tokens_are_drawn_from_the_softmax_at_the_temperature(backbone):
    prompt, draws = [5, 6, 7], 4000
    logits = backbone.model(torch.tensor([prompt])).logits[0, -1]
    logits[EOS] = -torch.inf
    expected = (logits / 1.5).softmax(-1)
    ids = draw(backbone, [prompt] * draws, max_new_tokens=1, min_new_tokens=1, temperature=1.5).ids[:, 0]
    seen = torch.bincount(ids, minlength=97) / draws
    # Five standard errors of a share that is estimated from the draws.
    assert ((seen - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-3).all()


def test_the_mask_ends_with_the_first_eos_and_nothing_stands_behind_it(backbone):
    answer = draw(backbone, [[5], [6], [7], [8]] * 8, max_new_tokens=60, temperature=3.0, pad_id=9)
    assert 0 < answer.ended.sum() < 32, "the seed must give rows of both kinds"
    for ids, mask, ended in zip(answer.ids, answer.mask, answer.ended, strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert (ids[length:] == 9).all()
        assert (ids[: length - 1] != EOS).all()
        assert bool(ended) == (int(ids[length - 1]) == EOS)


def test_a_sampled_pad_token_does_not_end_a_response(backbone):
    answer = draw(backbone, [[5]] * 32, max_new_tokens=20, temperature=5.0, pad_id=9)
    inside = (answer.ids == 9) & answer.mask
    assert inside.any(), "the seed must sample the pad token"
    row, column = inside.nonzero()[0].tolist()
    assert column == 19 or answer.mask[row, column + 1]


def test_no_response_ends_before_min_new_tokens(backbone):
    answer = draw(backbone, [[5]] * 32, max_new_tokens=12, min_new_tokens=6, temperature=5.0)
    assert (answer.mask.sum(1) >= 6).all()


def test_any_of_several_eos_tokens_ends_a_response(backbone):
    ids, mask = left_pad([[5]] * 64, pad_id=0)
    config, rng = SamplingConfig(max_new_tokens=30, temperature=3.0), torch.Generator().manual_seed(0)
    answer = sample(backbone, ids, mask, config, eos_ids=[EOS, 7], generator=rng)
    last = {int(row[int(length) - 1]) for row, length in zip(answer.ids, answer.mask.sum(1), strict=True)}
    assert {EOS, 7} <= last


def test_top_k_draws_only_from_the_k_likeliest(backbone):
    best = backbone.model(torch.tensor([[5, 6]])).logits[0, -1].index_fill(0, torch.tensor([EOS]), -1e9).topk(3).indices
    ids = draw(backbone, [[5, 6]] * 200, max_new_tokens=1, min_new_tokens=1, temperature=5.0, top_k=3).ids
    assert set(ids.flatten().tolist()) == set(best.tolist())


def test_top_p_keeps_the_smallest_set_that_holds_p(backbone):
    probs = backbone.model(torch.tensor([[5, 6]])).logits[0, -1].index_fill(0, torch.tensor([EOS]), -1e9).softmax(-1)
    ordered, index = probs.sort(descending=True)
    nucleus = set(index[: int((ordered.cumsum(0) < 0.6).sum()) + 1].tolist())
    ids = draw(backbone, [[5, 6]] * 500, max_new_tokens=1, min_new_tokens=1, top_p=0.6).ids
    assert set(ids.flatten().tolist()) <= nucleus


def test_temperature_zero_is_the_likeliest_token_every_time(backbone):
    answer = draw(backbone, [[5, 6, 7]], max_new_tokens=8, min_new_tokens=1, temperature=0.0)
    expected = backbone.model.generate(
        torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=8, min_new_tokens=1, pad_token_id=0
    )[0, 3:]
    assert answer.ids[0][answer.mask[0]].tolist() == expected.tolist()[: int(answer.mask.sum())]


def test_the_other_prompts_of_a_batch_change_no_greedy_response(backbone):
    together = draw(backbone, [[5], [6, 7, 8, 9], [10, 11]], max_new_tokens=6, temperature=0.0)
    alone = draw(backbone, [[5]], max_new_tokens=6, temperature=0.0)
    assert together.ids[0][together.mask[0]].tolist() == alone.ids[0][alone.mask[0]].tolist()


def test_the_same_seed_draws_the_same_responses(backbone):
    first, second = (draw(backbone, [[5], [6]], max_new_tokens=8, seed=3) for _ in range(2))
    assert torch.equal(first.ids, second.ids)


def test_the_log_prob_of_a_token_is_that_of_what_it_was_drawn_from(backbone):
    answer = draw(backbone, [[5, 6]] * 8, max_new_tokens=1, min_new_tokens=1, temperature=1.5, top_k=4, top_p=0.9)
    with torch.no_grad():
        logits = backbone.model(torch.tensor([[5, 6]])).logits[0, -1].double() / 1.5
    logits[EOS] = -torch.inf
    kept, index = logits.topk(4)
    before = kept.softmax(0).cumsum(0) - kept.softmax(0)
    expected = torch.full_like(logits, -torch.inf).index_copy(0, index, kept.masked_fill(before >= 0.9, -torch.inf))
    expected = expected.log_softmax(0)[answer.ids[:, 0]]
    torch.testing.assert_close(answer.logprob[:, 0].double(), expected, atol=1e-5, rtol=0)  # float32


def test_log_probs_are_zero_outside_the_mask_and_negative_inside(backbone):
    answer = draw(backbone, [[5], [6], [7], [8]] * 8, max_new_tokens=60, temperature=3.0, pad_id=9)
    assert not answer.mask.all()
    assert torch.equal(answer.logprob < 0, answer.mask)


def test_a_greedy_token_is_certain(backbone):
    assert (draw(backbone, [[5, 6]], max_new_tokens=4, temperature=0.0).logprob == 0).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("min_new_tokens", 33), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0)],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"SamplingConfig.{field}"):
        SamplingConfig(**{field: value})
