"""No tensor of (B, T, V) is ever allocated where the policy is trained or scored, at GPT-2's vocabulary."""

import pytest
import torch
from largest import Largest
from preference_trainer import trainer_on
from tiny import tiny_model

from hybrid.core import Encoded
from hybrid.data import collate, left_pad
from hybrid.models import Policy, Reference
from hybrid.objectives import PPOConfig, SFTConfig, ppo_batch_loss, sft_batch_loss, with_advantages
from hybrid.rollout import Responses, assemble

VOCAB, ROWS, PROMPT, RESPONSE = 50257, 8, 4, 28


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model("gpt2", vocab_size=VOCAB, n_embd=16)).eval()


@pytest.fixture(scope="module")
def limit(policy):
    """The logits of the responses; the head's own weight and gradient are smaller."""
    assert policy.backbone.head_weight.numel() < ROWS * RESPONSE * VOCAB
    return ROWS * RESPONSE * VOCAB


def responses():
    ids = torch.randint(3, VOCAB, (ROWS, RESPONSE), generator=torch.Generator().manual_seed(0))
    return Responses(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ROWS, dtype=torch.bool))


def rollout(policy, kl_kind):
    prompts = left_pad([[5] * PROMPT] * ROWS, pad_id=0)
    return assemble(policy, [Reference.from_policy(policy)], *prompts, responses(), torch.ones(ROWS), kl_kind=kl_kind)


@pytest.mark.parametrize("kl_kind", ["k1", "full"])
def test_scoring_never_holds_the_logits(policy, limit, kl_kind):
    with Largest() as largest:
        rollout(policy, kl_kind)
    assert 0 < largest.numel < limit


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_a_ppo_step_never_holds_the_logits(policy, limit, entropy_coef):
    config = PPOConfig(batch_size=ROWS, minibatch_size=ROWS, entropy_coef=entropy_coef)
    rows = with_advantages(rollout(policy, "k1"), config)
    with Largest() as largest:
        ppo_batch_loss(policy, rows, config)[0].backward()
    assert 0 < largest.numel < limit


def test_an_sft_step_never_holds_the_logits(policy, limit):
    ids = tuple(responses().ids[0].tolist())
    batch = collate([Encoded(ids, ids, ids[:1], "", "", {})] * ROWS, pad_id=0)
    with Largest() as largest:
        sft_batch_loss(policy, batch, SFTConfig())[0].backward()
    assert 0 < largest.numel < limit


def test_the_hook_would_see_the_logits(policy, limit):
    with Largest() as largest:
        policy.backbone.model(responses().ids)
    assert largest.numel >= limit


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dpo", {}),
        ("dpo", {"kind": "simpo"}),
        ("kto", {}),
        ("distill_data", {"kind": "forward"}),
        ("distill_data", {"kind": "jsd"}),
    ],
)
def test_a_step_on_preferences_never_holds_the_logits(policy, limit, name, settings, tokenizer):
    ids = [f"w{i % 70}" for i in range(RESPONSE)]
    rows = [{"prompt": f"the w{i}", "chosen": " ".join(ids), "rejected": " ".join(ids[i + 1 :])} for i in range(ROWS)]
    trainer = trainer_on(tokenizer, rows, model=policy.backbone.model, objectives={name: settings})
    given = {"dpo": trainer.pairs, "kto": trainer.answers, "distill_data": trainer.batch}[name](rows)
    with Largest() as largest:
        term = trainer.objectives[name].term(given)
        term.loss_of(term.rows)[0].backward()
    assert 0 < largest.numel < limit
