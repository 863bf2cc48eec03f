"""The policy that sees a window: the same window in sampling, old and reference log-probs, and PPO's forward."""

from dataclasses import replace

import pytest
import torch
from tiny import WIDE, tiny_model, tiny_policy

from hybrid.core import Encoded, InputError
from hybrid.models import Backbone, Policy, Reference, response_stats
from hybrid.objectives import PPOConfig, minibatches, ppo_batch_loss, with_advantages
from hybrid.rewards import make_reward
from hybrid.rollout import SamplingConfig, collect

WINDOW, NEW = 5, 12
# Some prompts are shorter than the window, one is longer.
PROMPTS = [(5, 6, 7, 8, 9, 10, 11), (12,), (13, 14, 15)]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}  # float32 sums in another order


@pytest.fixture(params=["gpt2", "llama"])
def policy(request):
    return tiny_policy(request.param, value_std=1.0)


def rolled(policy, tokenizer, decoder, *, family="llama", **options):
    rows = [Encoded(p, (-100,) * len(p), p, "", "", {}) for p in PROMPTS]
    reference = Reference.from_policy(Policy(tiny_model(family, seed=1)))
    return collect(
        policy, [reference], make_reward(lambda response: float(len(response))), rows, tokenizer=tokenizer,
        sampling=SamplingConfig(max_new_tokens=NEW, temperature=1.3, decoder=decoder), kl_coef=0.1,
        generator=torch.Generator().manual_seed(1), **options,
    ), reference  # fmt: skip


def markov(window=WINDOW):
    return {"type": "markov", "window": window}


def alone(model, head, ids, seen, mask):
    """Of each response token its log-prob at 1.3, by one forward over the last WINDOW tokens before it and no more."""
    found = torch.zeros(mask.shape)
    for row in range(len(mask)):
        tokens = ids[row][seen[row]].tolist()
        length = int(mask[row].sum())
        for place in range(length):
            before = tokens[: len(tokens) - length + place][-WINDOW:]
            logits = model(torch.tensor([before])).logits[0, -1] / 1.3
            found[row, place] = logits.log_softmax(0)[tokens[len(tokens) - length + place]]
    return found


def test_every_log_prob_is_that_of_the_window_alone(policy, tokenizer):
    rollout, reference = rolled(policy, tokenizer, markov())
    with torch.no_grad():
        layout = rollout.input_ids, rollout.attention_mask, rollout.mask
        expected = alone(policy.backbone.model, None, *layout)
        ref_expected = alone(reference.backbone.model, None, *layout)
    torch.testing.assert_close(rollout.old_logprob, expected, **CLOSE)
    torch.testing.assert_close(rollout.sampling_logprob, expected, **CLOSE)
    torch.testing.assert_close(rollout.ref_logprob[0], ref_expected, **CLOSE)
    assert rollout.window == WINDOW
    assert rollout.mask.sum() > 3 * WINDOW, "the seed must give responses that leave the window"


def test_neither_all_tokens_nor_a_banded_mask_give_the_same():
    shape = {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64}
    banded = Backbone(tiny_model("mistral", sliding_window=WINDOW, **shape)).eval()
    whole = Policy(tiny_model("mistral", sliding_window=None, **shape)).eval()
    whole.backbone.load_state_dict(banded.state_dict())
    ids = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    seen, mask = torch.ones_like(ids, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)

    def logprob(hidden):
        return response_stats(whole.backbone, hidden, ids, mask).logprob

    with torch.no_grad():
        right = logprob(whole(ids, seen, window=WINDOW, length=8).hidden)
        for other in (banded(ids, seen), whole(ids, seen).hidden):
            assert (logprob(other) - right).abs().max() > 0.05


@pytest.mark.parametrize("window", [7 + NEW - 1, 60])
def test_a_window_that_holds_everything_is_sample_bit_for_bit(policy, tokenizer, window):
    found, _ = rolled(policy, tokenizer, markov(window))
    plain, _ = rolled(policy, tokenizer, {"type": "sample"})
    for name in ("input_ids", "mask", "sampling_logprob", "old_logprob", "ref_logprob", "old_value", "reward"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name


def test_a_window_of_one_less_is_not(policy, tokenizer):
    found, _ = rolled(policy, tokenizer, markov(7 + NEW - 2))
    plain, _ = rolled(policy, tokenizer, {"type": "sample"})
    assert found.mask[0].all()
    assert not torch.equal(found.old_logprob, plain.old_logprob)


def test_every_first_ratio_of_ppo_is_one_and_without_the_window_none(policy, tokenizer):
    config = PPOConfig(batch_size=3, minibatch_size=2, epochs=1)
    rollout = with_advantages(rolled(policy, tokenizer, markov(), minibatch_size=2)[0], config)
    for rows in minibatches(len(rollout), config):
        metrics = ppo_batch_loss(policy, rollout[rows].trimmed(), config)[1]
        assert metrics["ratio_max"] == metrics["ratio_mean"] == 1.0
    blind = replace(rollout, window=None)
    assert (ppo_batch_loss(policy, blind, config)[1]["ratio_mean"] - 1).abs() > 0.01


def test_the_gradient_is_that_of_every_window_by_itself(policy, tokenizer):
    rollout, _ = rolled(policy, tokenizer, markov())
    out = policy(rollout.input_ids, rollout.attention_mask, window=WINDOW, length=rollout.mask.shape[1])
    stats = response_stats(policy.backbone, out.hidden, rollout.input_ids, rollout.mask, temperature=1.3)
    stats.logprob.sum().backward()
    found = {name: p.grad.clone() for name, p in policy.backbone.named_parameters()}
    policy.zero_grad()
    layout = rollout.input_ids, rollout.attention_mask, rollout.mask
    alone(policy.backbone.model, None, *layout).sum().backward()
    for name, p in policy.backbone.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-3, rtol=1e-3)  # sums of 30 tokens


def test_the_value_of_a_state_is_that_of_the_window(policy, tokenizer):
    rollout, _ = rolled(policy, tokenizer, markov())
    tokens = rollout.input_ids[0][rollout.attention_mask[0]]
    length = int(rollout.mask[0].sum())
    before = tokens[: len(tokens) - 1][-WINDOW:].unsqueeze(0)
    with torch.no_grad():
        expected = policy(before, torch.ones_like(before)).value[0, -1]
    torch.testing.assert_close(rollout.old_value[0, length - 1], expected, **CLOSE)


def test_a_window_longer_than_the_context_is_refused(policy, tokenizer):
    with pytest.raises(InputError, match=r"decoder\.window must be at most the model's context of 64 tokens, got 65"):
        rolled(policy, tokenizer, markov(65))
