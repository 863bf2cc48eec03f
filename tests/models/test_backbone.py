"""The seam between trunk and head, on real model families."""

import pytest
import torch
from tiny import CELLS, FAMILIES, tiny_model
from torch.nn.functional import linear

from hybrid.core import Batch, InputError
from hybrid.functional import soft_capped, token_logprob
from hybrid.models import Backbone, Policy, check_packing, response_stats

# Sums in another order, in float32, of numbers around 1.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=sorted({*FAMILIES, *CELLS}))
def backbone(request):
    return Backbone(tiny_model(request.param)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens():
    ids = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def test_hidden_states_through_the_head_are_the_models_own_logits(backbone, tokens):
    hidden = backbone(*tokens)
    logits = soft_capped(linear(hidden, backbone.head_weight, backbone.head_bias), backbone.softcap)
    torch.testing.assert_close(logits, backbone.model(tokens[0]).logits, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_hidden_state(backbone, tokens, side):
    ids, mask = tokens
    filler = torch.full((2, 3), 5)
    parts = [(filler, torch.zeros_like(filler, dtype=torch.bool)), (ids, mask)]
    parts = parts if side == "left" else parts[::-1]
    padded = backbone(torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1))
    own = padded[:, 3:] if side == "left" else padded[:, :10]
    torch.testing.assert_close(own, backbone(ids, mask), **CLOSE)


def test_packed_segments_do_not_see_each_other(backbone, tokens):
    ids, mask = tokens
    packed = torch.cat([ids[0, :6], ids[1, :4], torch.zeros(2, dtype=torch.long)]).unsqueeze(0)
    segments = torch.tensor([[1] * 6 + [2] * 4 + [0] * 2])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1]])
    hidden, alone = backbone(packed, segments, positions), backbone(ids, mask)
    torch.testing.assert_close(hidden[0, :6], alone[0, :6], **CLOSE)
    torch.testing.assert_close(hidden[0, 6:10], alone[1, :4], **CLOSE)


def test_the_cache_gives_the_same_next_logits_as_one_forward(backbone, tokens):
    ids, mask = tokens
    ids, mask = torch.cat([ids[:, :3], ids], 1), torch.cat([torch.zeros_like(mask[:, :3]), mask], 1)
    logits, cache = backbone.next_logits(ids[:, :7], mask[:, :7])
    for t in range(7, 13):
        logits, cache = backbone.next_logits(ids[:, t : t + 1], mask[:, : t + 1], cache)
    torch.testing.assert_close(logits, backbone.model(tokens[0]).logits[:, -1], **CLOSE)


def test_packing_is_checked_and_refused_where_segments_are_not_kept_apart(backbone):
    check_packing(backbone, 64)
    from transformers import BloomConfig, BloomForCausalLM

    # ALiBi: positions come from the mask, which has no segments.
    other = Backbone(BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)))
    with pytest.raises(InputError, match="packing"):
        check_packing(other, 64)


def test_the_logits_of_a_soft_capped_model_are_capped():
    model = tiny_model("gemma2")
    policy, ids = Policy(model), torch.arange(1, 9).view(2, 4)
    logits = model(input_ids=ids).logits
    assert policy.backbone.softcap == 3.0
    assert logits.abs().max() > 2.0
    with torch.no_grad():
        logprob, _ = policy.batch_logprob(Batch(ids, torch.ones_like(ids), ids))
        torch.testing.assert_close(logprob, token_logprob(logits[:, :-1], ids[:, 1:]), atol=1e-5, rtol=1e-5)
        next_logits, _ = policy.backbone.next_logits(ids, torch.ones_like(ids))
    torch.testing.assert_close(next_logits, logits[:, -1], atol=1e-5, rtol=1e-5)


def test_segment_numbers_without_positions_are_refused():
    ids = torch.arange(3, 8).view(1, 5)
    with pytest.raises(InputError, match="position_ids"):
        Backbone(tiny_model())(ids, torch.tensor([[1, 1, 1, 2, 2]]))


def test_an_exact_kl_between_different_soft_caps_is_refused():
    capped, plain = Policy(tiny_model("gemma2")).backbone, Policy(tiny_model("llama")).backbone
    hidden, ids = torch.zeros(1, 4, 32), torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(InputError, match=r"soft-cap, 3\.0; it has None"):
        response_stats(
            capped, hidden, ids, torch.ones(1, 2, dtype=torch.bool), want=("kl",), reference=plain, ref_hidden=hidden
        )


def test_a_model_that_is_nowhere_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="not found"):
        Backbone.from_pretrained(str(tmp_path / "no-such-model"))
