"""The joint loss: its ends, its gradient, and the schedules that move between them."""

import math

import pytest
import torch
from test_conformance import ROWS, score, trainer_of
from tiny import tiny_model
from whole_run import weights

from hybrid import DataConfig, HybridConfig, HybridTrainer, InputError, Policy, PPOConfig, SFTConfig
from hybrid.core import Encoded
from hybrid.mixing import Plan, make_strategy
from hybrid.objectives import with_advantages
from hybrid.objectives.update import update


def run(tokenizer, spec, **sections):
    trainer = trainer_of("joint", tokenizer, **sections)
    trainer.strategy = make_strategy(spec)
    trainer.train()
    return weights(trainer)


def test_mu_one_is_supervised_training_bit_for_bit(tokenizer):
    joint = run(tokenizer, {"strategy": "joint", "mu": 1.0, "steps": 4})
    assert torch.equal(joint, run(tokenizer, {"strategy": "sequential", "sft_steps": 4, "ppo_steps": 0}))


def test_mu_zero_is_ppo_bit_for_bit(tokenizer):
    joint = run(tokenizer, {"strategy": "joint", "mu": 0.0, "steps": 2})
    assert torch.equal(joint, run(tokenizer, {"strategy": "sequential", "sft_steps": 0, "ppo_steps": 2}))


def test_gamma_zero_of_ptx_is_ppo_bit_for_bit(tokenizer):
    ptx = run(tokenizer, {"strategy": "ptx", "gamma": 0.0, "steps": 2})
    assert torch.equal(ptx, run(tokenizer, {"strategy": "sequential", "sft_steps": 0, "ppo_steps": 2}))


class Recorder(torch.optim.SGD):
    """Keeps the gradient that it was given, and changes nothing."""

    def step(self):
        parameters = self.param_groups[0]["params"]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.seen = torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_the_joint_gradient_is_the_weighted_sum_of_both(tokenizer, mu):
    trainer = trainer_of("joint", tokenizer)
    policy = trainer.policy.double()
    rollout = with_advantages(trainer.rollout(next(trainer.prompts)), trainer.config.ppo)
    batch = next(trainer.loader)

    def gradient(*terms):
        optimizer = Recorder(policy.parameters(), lr=0.1)
        update(policy, optimizer, terms, max_grad_norm=math.inf)
        return optimizer.seen

    ppo, sft = trainer.objectives["ppo"], trainer.objectives["sft"]
    together = gradient(ppo.term(rollout, 1 - mu), sft.term(batch, mu))
    apart = (1 - mu) * gradient(ppo.term(rollout)) + mu * gradient(sft.term(batch))
    # Llama's norms compute in float32, whatever the weights are: its rounding is what is left.
    assert (together - apart).abs().max() < 1e-6 * apart.abs().max()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"mu": 0.4}, [0.4] * 5),
        ({"mu": 0.8, "schedule": "linear", "final_mu": 0.2}, [0.8, 0.65, 0.5, 0.35, 0.2]),
        # Up to the peak over two steps, then half a cosine of two steps to the valley: half-way is the middle.
        ({"mu": 0.9, "schedule": "chord", "final_mu": 0.1, "warmup_steps": 2}, [0.0, 0.45, 0.9, 0.5, 0.1]),
        ({"mu": 0.9, "schedule": "chord", "final_mu": 0.1, "decay_steps": 2}, [0.9, 0.5, 0.1, 0.1, 0.1]),
    ],
)
def test_schedules_of_mu_by_hand(spec, expected):
    strategy = make_strategy({"strategy": "joint", "steps": 5, **spec})
    plans = [strategy.plan(step, {}) for step in range(5)]
    assert [plan.sft_coef for plan in plans] == pytest.approx(expected)
    assert [plan.ppo_coef for plan in plans] == pytest.approx([1 - mu for mu in expected])
    assert strategy.plan(5, {}) is None


def test_a_step_where_mu_is_zero_needs_no_supervised_batch(tokenizer):
    trainer = trainer_of("joint", tokenizer)
    trainer.strategy = make_strategy({"strategy": "joint", "mu": 0.0, "steps": 2})
    trainer.train()
    assert trainer.loader.position == 0


def test_every_update_of_a_joint_step_has_its_own_supervised_batch(tokenizer):
    trainer = trainer_of("joint", tokenizer)
    trainer.strategy = make_strategy({"strategy": "joint", "steps": 1})
    trainer.train()
    assert trainer.loader.position == trainer.config.ppo.num_updates * trainer.config.sft.batch_size


def test_a_joint_step_goes_on_without_supervised_batches_where_they_end(tokenizer):
    trainer = trainer_of("joint", tokenizer)
    rollout = trainer.rollout(next(trainer.prompts))
    metrics = trainer.joint_step(rollout, iter([next(trainer.loader)]), sft_coef=0.5, ppo_coef=0.5)
    assert {"sft_loss", "ppo_loss", "nll", "policy_loss"} <= metrics.keys()


def test_supervised_batches_hold_the_rows_with_a_target_and_rollouts_all(tokenizer):
    rows = [{**row, "target": row["target"] if i == 2 else ""} for i, row in enumerate(ROWS)]
    config = HybridConfig(data=DataConfig(template="none"), sft=SFTConfig(batch_size=1))
    trainer = HybridTrainer(Policy(tiny_model()), tokenizer, rows, score, config)
    assert len(trainer.loader.examples) == 1 and len(trainer.prompts.examples) == len(ROWS)
    assert all(next(trainer.loader).num_tokens for _ in ROWS)


def test_a_factor_of_a_supervised_step_alone_is_refused():
    with pytest.raises(ValueError, match=r"sft_coef must be 1 where it stands alone, got 0\.5; sft\.lr_factor"):
        Plan(0, sft_coef=0.5)


def test_the_rate_of_a_joint_step_lies_between_the_phases(tokenizer):
    from dataclasses import replace

    trainer = trainer_of("joint", tokenizer)
    trainer.config = replace(
        trainer.config, sft=replace(trainer.config.sft, lr_factor=3.0), ppo=replace(trainer.config.ppo, lr_factor=1.0)
    )
    rollout = trainer.rollout(next(trainer.prompts))
    metrics = trainer.joint_step(rollout, trainer.loader, sft_coef=0.25, ppo_coef=0.75)
    assert metrics["lr"] == pytest.approx(1e-2 * (0.25 * 3 + 0.75 * 1))


def test_ptx_learns_from_the_second_data_set_alone(tokenizer, monkeypatch):
    trainer = trainer_of("ptx", tokenizer)
    trainer.train()
    assert trainer.ptx_loader.position and not trainer.loader.position


def test_ptx_on_prompts_alone_is_refused_before_the_first_step(tokenizer):
    trainer = HybridTrainer(
        Policy(tiny_model()), tokenizer, ROWS, score, HybridConfig(mixing={"strategy": "ptx"}),
        ptx_data=[{"prompt": "the w1"}],
    )  # fmt: skip
    with pytest.raises(InputError, match="none of the 1 examples of objective 'ptx' has one"):
        trainer.train()


def test_ptx_without_a_second_data_set_is_refused_before_a_model_is_loaded():
    from hybrid import HybridConfig, HybridTrainer

    with pytest.raises(InputError, match=r"give ptx_data\.train"):
        HybridTrainer("no/such-model", train_data=ROWS, reward=score, config=HybridConfig(mixing={"strategy": "ptx"}))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"mu": 1.5}, r"mixing.mu must lie in \[0.0, 1.0\], got 1.5"),
        ({"mu": float("nan")}, "mixing.mu must lie in"),
        ({"steps": 0}, "mixing.steps must be >= 1"),
        ({"warmup_steps": 3}, "mixing.warmup_steps is not of schedule 'constant'"),
        ({"schedule": "cosine"}, "mixing.schedule must be one of"),
        ({"strategy": "ptx", "gamma": -1.0}, "mixing.gamma must be >= 0"),
        ({"strategy": "hint", "share": 2.0}, "mixing.share must lie in"),
        ({"strategy": "gate", "buffer": 0}, "mixing.buffer must be >= 1"),
        ({"curriculum": "reward"}, "target_reward goes with curriculum 'reward'"),
        ({"final_sft_steps_per_cycle": 2}, "mixing.final_sft_steps_per_cycle needs a curriculum"),
    ],
)
def test_a_bad_spec_is_refused_by_name(spec, message):
    strategy = "alternate" if "curriculum" in spec or "final_sft_steps_per_cycle" in spec else "joint"
    with pytest.raises(InputError, match=message):
        make_strategy({"strategy": strategy, **spec})


def encoded(num_target=9):
    """A prompt of three tokens, an answer of nine, EOS."""
    answer = tuple(range(10, 10 + num_target))
    return Encoded((5, 6, 7, *answer, 2), (-100,) * 3 + (*answer, 2), (5, 6, 7), "p", "t", {})


def test_the_share_of_a_hint_falls_along_half_a_cosine_and_ends():
    strategy = make_strategy({"strategy": "hint", "steps": 12, "hint_steps": 10, "share": 0.9, "final_share": 0.1})
    shares = [strategy.share_at(step) for step in range(12)]
    # UFT, eq. B.1: (t + 1) / T_hint, so the half-way point is step 4 and the valley step 9.
    assert shares[4] == pytest.approx(0.5) and shares[9] == pytest.approx(0.1)
    assert shares[:10] == sorted(shares[:10], reverse=True) and shares[10:] == [0.0, 0.0]


def test_the_length_of_a_hint_is_binomial():
    strategy = make_strategy({"strategy": "hint", "steps": 1, "share": 0.3, "final_share": 0.3})
    lengths = [e.num_hint for e in strategy.prompts([encoded()] * 4000, 0)]
    mean = sum(lengths) / len(lengths)
    variance = sum((n - mean) ** 2 for n in lengths) / len(lengths)
    # Binomial(9, 0.3): mean 2.7, variance 1.89; their standard errors here are 0.022 and 0.043.
    assert mean == pytest.approx(2.7, abs=0.1) and variance == pytest.approx(1.89, abs=0.2)


def test_a_hint_is_the_beginning_of_the_target_and_never_its_eos():
    strategy = make_strategy({"strategy": "hint", "steps": 1, "share": 1.0, "final_share": 1.0})
    (hinted,) = strategy.prompts([encoded()], 0)
    assert hinted.prompt_ids == encoded().input_ids[:-1] and hinted.num_hint == 9


def test_only_the_hint_is_imitated(tokenizer):
    trainer = trainer_of("hint", tokenizer)
    strategy = make_strategy({"strategy": "hint", "share": 0.5, "final_share": 0.5, "sft_coef": 1.0})
    examples = strategy.prompts(next(trainer.prompts).examples, 0)
    batch = next(strategy.supervised(trainer, examples))
    assert batch.num_tokens == sum(e.num_hint for e in batch.examples) > 0


def gate(scores, spec, groups=None, examples=None):
    """What a gate does with a rollout of these scores: (rows that PPO learns from, the next plan)."""
    from types import SimpleNamespace

    strategy = make_strategy({"strategy": "gate", "ppo_steps": 5, **spec})
    groups = list(range(len(scores))) if groups is None else groups
    rollout = SimpleNamespace(group=torch.tensor(groups), score=torch.tensor(scores))
    strategy.plan(0, {})
    rows = strategy.trained_rows(rollout, examples or [encoded(3 + i) for i in range(max(groups) + 1)])
    return rows.tolist(), strategy.plan(1, {}), strategy


def test_a_gate_teaches_the_prompts_whose_responses_all_fail():
    rows, plan, strategy = gate([0.0, 1.0, 0.0, 0.0, 1.0, 1.0], {}, groups=[0, 0, 1, 1, 2, 2])
    assert rows == [0, 1, 4, 5]
    assert plan.kind == "sft" and plan.examples == (encoded(4),)
    assert strategy.metrics() == {"failed_share": pytest.approx(1 / 3), "buffered": 0.0}


def test_a_gate_may_judge_by_the_mean():
    rows, plan, _ = gate([0.0, 1.0, 1.0, 1.0], {"judge_by": "mean", "threshold": 0.5}, groups=[0, 0, 1, 1])
    assert rows == [2, 3] and plan.examples == (encoded(3),)


def test_a_buffer_waits_until_it_is_full():
    rows, plan, strategy = gate([0.0, 1.0], {"buffer": 2})
    assert rows == [1] and plan.kind == "ppo"
    assert strategy.metrics()["buffered"] == 1.0


def test_a_failed_prompt_without_a_target_stays_with_ppo():
    untaught = Encoded((5, 6, 7), (-100,) * 3, (5, 6, 7), "p", "", {})
    rows, plan, _ = gate([0.0, 0.0], {}, examples=[untaught, encoded()])
    assert rows == [0] and plan.examples == (encoded(),)


def test_a_rollout_whose_prompts_all_fail_makes_no_ppo_update(tokenizer):
    trainer = trainer_of("gate", tokenizer)
    rollout = trainer.rollout(next(trainer.prompts))
    before = weights(trainer).clone()
    metrics = trainer.joint_step(rollout, rows=torch.tensor([], dtype=torch.long))
    assert torch.equal(weights(trainer), before)
    assert metrics["reward"] == pytest.approx(rollout.score.mean().item()) and "policy_loss" not in metrics


def test_one_epoch_and_one_minibatch_of_ppo_is_a2c(tokenizer):
    runs = []
    for clip in (0.2, None):
        ppo = PPOConfig(batch_size=4, minibatch_size=4, epochs=1, clip=clip)
        runs.append(run(tokenizer, {"strategy": "sequential", "sft_steps": 0, "ppo_steps": 2}, ppo=ppo))
    assert torch.equal(*runs)


def test_policies_of_the_suite_start_alike():
    first, second = (Policy(tiny_model("llama", seed=1)) for _ in range(2))
    assert all(map(torch.equal, first.parameters(), second.parameters()))
