"""Losses and logged metrics of TRL's own trainers on a fixed batch, against ours of the same token ids.

The trainers are built as a user builds them, on tiny random models; nothing is trained.
"""

import pytest
import torch
from linear_case import Case
from tiny import COMMON, FAMILIES, tiny_model

from hybrid.core import Batch
from hybrid.functional import PER_TOKEN, bradley_terry_loss, dpo_loss, kto_loss, linear_divergence
from hybrid.models import Policy

trl = pytest.importorskip("trl", reason="TRL is no dependency: pip install trl==1.12.0 to compare with it")
Dataset = pytest.importorskip("datasets").Dataset

pytestmark = pytest.mark.slow

# Both take float32 log-softmax of the same logits, of sums up to a few dozen nats; squares of IPO and SPPO are scaled
# by it too.
CLOSE = {"rel": 1e-5, "abs": 1e-5}
BETA = 0.2
PAIRS = [
    {"prompt": "w1 w2 w3", "chosen": " w4 good w5", "rejected": " bad w6"},
    {"prompt": "w7", "chosen": " fine", "rejected": " dull sad w8 w9 w10"},
    {"prompt": "the w11 is", "chosen": " happy yes", "rejected": " w12 no w13"},
    {"prompt": "it was w14 w15", "chosen": " w16 w17 w18 w19", "rejected": " w20"},
]
METRICS = {
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "margin_mean": "rewards/margins",
    "accuracy": "rewards/accuracies",
}
# Their name of each kind that DPOTrainer has, and what it is given there and here.
KINDS = {
    "sigmoid": ("sigmoid", 0.0),
    "robust": ("robust", 0.2),
    "hinge": ("hinge", 0.0),
    "ipo": ("ipo", 0.0),
    "apo_zero": ("apo_zero", 0.0),
    "apo_down": ("apo_down", 0.0),
    "sppo": ("sppo_hard", 0.0),
    "exo": ("exo_pair", 1e-3),
}


def arguments(folder):
    """What every trainer is given to run quietly, on the CPU, in float32."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": len(PAIRS),
        "disable_tqdm": True,
        "max_length": 64,
    }


def models():
    """A policy and a reference of other weights. Without dropout training mode computes what eval mode does."""
    return tiny_model(seed=0).train(), tiny_model(seed=1)


def fixed_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def loss_and_log(trainer, inputs):
    """TRL's loss of the inputs, and what it logs of them."""
    logged = {}
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs).item()
    trainer.log(logged)
    return loss, logged


@torch.no_grad()
def response_logprob(model, ids, attention, labels, *, mean=False):
    """(B,) of the tokens whose label is one, by our own forward."""
    logprob, trained = Policy(model).batch_logprob(Batch(ids, attention.bool(), labels))
    return logprob.sum(1) / (trained.sum(1) if mean else 1)


def halves(model, inputs, *, mean=False):
    """Of DPOTrainer's inputs, chosen rows above the rejected ones."""
    ids = inputs["input_ids"]
    labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)
    return response_logprob(model, ids, inputs["attention_mask"], labels, mean=mean).chunk(2)


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_is_dpo_trainer_s(kind, tokenizer, tmp_path):
    policy, reference = models()
    name, smoothing = KINDS[kind]
    config = trl.DPOConfig(**arguments(tmp_path), beta=BETA, loss_type=[name], label_smoothing=smoothing)
    data = Dataset.from_list(PAIRS)
    trainer = trl.DPOTrainer(policy, reference, config, train_dataset=data, processing_class=tokenizer)
    inputs = fixed_batch(trainer)
    expected, logged = loss_and_log(trainer, inputs)

    given = [*halves(policy, inputs), *halves(reference, inputs)]
    loss, metrics = dpo_loss(*given, beta=BETA, kind=kind, label_smoothing=smoothing)
    if kind in PER_TOKEN:
        # TRL logs sums all the same.
        means = [*halves(policy, inputs, mean=True), *halves(reference, inputs, mean=True)]
        assert loss.item() != pytest.approx(expected, **CLOSE)
        loss, _ = dpo_loss(*means, beta=BETA, kind=kind)
    assert loss.item() == pytest.approx(expected, **CLOSE)
    for ours, theirs in METRICS.items():
        assert metrics[ours].item() == pytest.approx(logged[theirs], **CLOSE), ours


def paired(policy, inputs):
    """Mean log-probs of the older trainers' inputs, each side in tensors of its own."""
    names = ("input_ids", "attention_mask", "labels")
    sides = [[inputs[f"{side}_{name}"] for name in names] for side in ("chosen", "rejected")]
    return [response_logprob(policy, *side, mean=True) for side in sides]


def test_simpo_is_cpo_trainer_s(tokenizer, tmp_path):
    cpo = pytest.importorskip("trl.experimental.cpo")
    policy, _ = models()
    own = {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0, "label_smoothing": 0.1}
    config = cpo.CPOConfig(**arguments(tmp_path), **own)
    trainer = cpo.CPOTrainer(policy, config, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    inputs = fixed_batch(trainer)
    with torch.no_grad():
        expected, logged = trainer.get_batch_loss_metrics(policy, inputs)

    given = paired(policy, inputs)
    loss, metrics = dpo_loss(*given, None, None, beta=2.0, kind="simpo", margin=0.7, label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), **CLOSE)
    for ours, theirs in METRICS.items():
        assert metrics[ours].item() == pytest.approx(logged[theirs], **CLOSE), ours


def test_orpo_is_orpo_trainer_s_without_its_cross_entropy(tokenizer, tmp_path):
    orpo = pytest.importorskip("trl.experimental.orpo")
    policy, _ = models()
    config = orpo.ORPOConfig(**arguments(tmp_path), beta=BETA)
    trainer = orpo.ORPOTrainer(policy, config, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    inputs = fixed_batch(trainer)
    with torch.no_grad():
        whole, logged = trainer.get_batch_loss_metrics(policy, inputs)

    loss, metrics = dpo_loss(*paired(policy, inputs), None, None, beta=BETA, kind="orpo")
    assert loss.item() == pytest.approx(whole.item() - logged["nll_loss"], **CLOSE)
    for ours, theirs in METRICS.items():
        assert metrics[ours].item() == pytest.approx(logged[theirs], **CLOSE), ours


@pytest.mark.parametrize("swapped", [False, True], ids=["estimate below 0", "estimate above 0"])
def test_kto_is_kto_trainer_s(swapped, tokenizer, tmp_path):
    policy, reference = reversed(models()) if swapped else models()
    policy.train()
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i != 1} for i, r in enumerate(PAIRS)]
    own = {"beta": BETA, "desirable_weight": 0.8, "undesirable_weight": 1.7}
    config = trl.KTOConfig(**arguments(tmp_path), **own)
    data = Dataset.from_list(rows)
    trainer = trl.KTOTrainer(policy, reference, config, train_dataset=data, processing_class=tokenizer)
    inputs = fixed_batch(trainer)
    expected, logged = loss_and_log(trainer, inputs)

    def of(model, prefix=""):
        ids, attention, mask = (inputs[prefix + x] for x in ("input_ids", "attention_mask", "completion_mask"))
        return response_logprob(model, ids, attention, ids.masked_fill(mask == 0, -100))

    estimate = (of(policy, "KL_") - of(reference, "KL_")).mean()
    assert (estimate > 0) == swapped
    loss, metrics = kto_loss(of(policy), of(reference), inputs["label"].bool(), estimate, **own)
    assert loss.item() == pytest.approx(expected, **CLOSE)
    theirs = {"desirable_reward": "rewards/chosen", "undesirable_reward": "rewards/rejected", "kl": "kl"}
    for ours, name in theirs.items():
        assert metrics[ours].item() == pytest.approx(logged[name], **CLOSE), ours


@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 1.5, -0.2]])
def test_bradley_terry_is_reward_trainer_s(margins, tokenizer, tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    own = {**COMMON, **FAMILIES["llama"], "num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **own))
    torch.nn.init.normal_(model.score.weight, std=0.5)
    rows = PAIRS if margins is None else [{**row, "margin": m} for row, m in zip(PAIRS, margins, strict=True)]
    config = trl.RewardConfig(**arguments(tmp_path), center_rewards_coefficient=0.05)
    trainer = trl.RewardTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    inputs = fixed_batch(trainer)
    with torch.no_grad():
        scores = model(inputs["input_ids"], inputs["attention_mask"]).logits.squeeze(-1)
    margin = inputs.get("margin")
    assert (margin is None) == (margins is None)
    model.train()
    expected, logged = loss_and_log(trainer, inputs)

    loss, metrics = bradley_terry_loss(*scores.chunk(2), margin=margin, center_coef=0.05)
    assert loss.item() == pytest.approx(expected, **CLOSE)
    assert metrics["accuracy"].item() == pytest.approx(logged["accuracy"], **CLOSE)
    assert metrics["margin_mean"].item() == pytest.approx(logged["margin"], **CLOSE)


@pytest.mark.parametrize(
    ("kind", "mix", "beta"), [("forward", 0.5, 0.0), ("reverse", 0.5, 1.0), ("jsd", 0.5, 0.5), ("jsd", 0.2, 0.2)]
)
def test_divergence_is_gkd_trainer_s(kind, mix, beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    case = Case(vocab=11)
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        case.logits(), case.logits(ref=True), beta=beta, temperature=1.5, reduction="none"
    ).sum(-1)
    found = linear_divergence(
        case.hidden,
        case.weight,
        case.ref_hidden,
        case.ref_weight,
        bias=case.bias,
        ref_bias=case.ref_bias,
        kind=kind,
        mix=mix,
        temperature=1.5,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
