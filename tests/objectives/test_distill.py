"""Objectives distill and distill_data: the divergence against whole distributions, and their teacher."""

import pytest
import torch
from preference_trainer import trainer_on
from tiny import tiny_model

from hybrid import InputError, Policy
from hybrid.config import ReferenceConfig
from hybrid.core import IGNORE
from hybrid.models import Reference

ROWS = [{"prompt": f"the w{i}", "target": f"was good w{i + 1}"} for i in range(6)]


def trainer_with(tokenizer, teacher=None, **settings):
    teacher = Reference.from_policy(Policy(tiny_model(seed=5) if teacher is None else teacher))
    return trainer_on(tokenizer, ROWS, given={"reference": teacher}, objectives=settings)


def distributions(trainer, input_ids, attention_mask):
    """(policy's, teacher's) log-probs of all tokens, (B, T, V) float64."""
    mask = attention_mask.long()
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    models = trainer.policy.backbone.model, trainer.references[0].backbone.model
    with torch.no_grad():
        return [model(input_ids, **options).logits.double().log_softmax(-1) for model in models]


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_the_loss_is_the_divergence_of_whole_distributions(kind, tokenizer):
    trainer = trainer_with(tokenizer, distill={"kind": kind, "mix": 0.3})
    rollout = trainer.rollout(trainer.corpus.train[:4], scored=False)
    p, q = (
        x[:, rollout.prompt_length - 1 : -1] for x in distributions(trainer, rollout.input_ids, rollout.attention_mask)
    )
    mixture = (0.3 * q.exp() + 0.7 * p.exp()).log()
    each = {
        "reverse": (p.exp() * (p - q)).sum(-1),
        "forward": (q.exp() * (q - p)).sum(-1),
        "jsd": 0.3 * (q.exp() * (q - mixture)).sum(-1) + 0.7 * (p.exp() * (p - mixture)).sum(-1),
    }[kind]
    term = trainer.objectives["distill"].term(rollout)
    loss, _ = term.loss_of(rollout)
    assert float(loss.detach()) == pytest.approx(float(each[rollout.mask].mean()), rel=1e-4)


def test_the_datas_targets_can_be_distilled_on(tokenizer):
    trainer = trainer_with(tokenizer)
    batch = trainer.batch(ROWS)
    p, q = (x[:, :-1] for x in distributions(trainer, batch.input_ids, batch.attention_mask))
    trained = batch.labels[:, 1:] != IGNORE
    expected = (q.exp() * (q - p)).sum(-1)[trained].mean()
    trainer.policy.eval()
    loss, _ = trainer.objectives["distill_data"].loss_of(batch)(batch)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["distill", "distill_data"])
def test_it_draws_the_policy_to_the_teacher_without_a_reward(name, tokenizer):
    trainer = trainer_with(tokenizer)
    trainer.strategy = type(trainer.strategy)()
    losses = []
    for _ in range(12):
        if name == "distill":
            rollout = trainer.rollout(next(trainer.prompts), scored=False)
            losses.append(trainer.rollout_step(rollout, {name: 1.0})["loss"])
        else:
            losses.append(trainer.batch_step({name: 1.0})["loss"])
    assert losses[-1] < 0.9 * losses[0]


def test_a_run_of_distill_needs_no_reward(tokenizer):
    trainer = trainer_on(
        tokenizer, ROWS, given={"reference": Policy(tiny_model(seed=5))},
        mixing={"strategy": "objective", "objective": "distill", "steps": 2},
    )  # fmt: skip
    trainer.train()
    assert trainer.num_steps == 2


def test_a_teacher_of_another_vocabulary_is_refused(tokenizer):
    trainer = trainer_with(tokenizer, tiny_model(vocab_size=99))
    with pytest.raises(InputError, match=r"vocabulary of 97, and references\[0\] has 99"):
        trainer.objectives["distill"].check()


def test_a_mixture_weight_outside_of_its_range_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"objectives\.distill: mix must lie in \(0, 1\), got 1\.5"):
        trainer_with(tokenizer, distill={"mix": 1.5})


@pytest.mark.slow
def test_a_teachers_folder_is_distilled_on_beside_ppo_and_the_targets(tokenizer, tmp_path):
    """The teacher was fine-tuned on the targets; PPO is held to where the policy began, not to the teacher."""
    taught = trainer_on(tokenizer, ROWS, model=tiny_model(seed=5), mixing={"strategy": "objective", "steps": 30})
    taught.train()
    taught.save(tmp_path / "teacher")
    references = [{}, {"model": str(tmp_path / "teacher"), "weight": 0.0}]
    trainer = trainer_on(
        tokenizer, ROWS, reward=lambda response: float(len(response)),
        references=tuple(ReferenceConfig(**reference) for reference in references),
        objectives={"distill": {"reference": 1}},
        mixing={"strategy": "blend", "steps": 8, "coefs": {"ppo": 0.1, "distill": 1.0, "sft": 0.1}},
    )  # fmt: skip
    rollout = trainer.rollout(trainer.corpus.train, scored=False)
    assert not rollout.kl.any(), "the policy is its own first reference, and the teacher has no weight"
    divergence = [float(trainer.objectives["distill"].term(rollout).loss_of(rollout)[0].detach())]
    trainer.train()
    divergence.append(float(trainer.objectives["distill"].term(rollout).loss_of(rollout)[0].detach()))
    assert divergence[1] < 0.8 * divergence[0]
