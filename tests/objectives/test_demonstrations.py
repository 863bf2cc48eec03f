"""Objectives luffy, srft, hpt and prefix_rft: their losses from a plain model's logits in float64, row by row."""

import math
from dataclasses import replace

import pytest
import torch
from demonstration_case import OF, ROWS, Plain, advantages, loss_of, prefixed, rolled, trainer_of

from hybrid import HybridConfig, InputError
from hybrid.core import IGNORE
from hybrid.mixing import make_strategy
from hybrid.objectives import with_advantages


def test_a_group_has_its_demonstration_behind_its_responses(tokenizer):
    trainer = trainer_of(tokenizer)
    rollout, rows = rolled(trainer, "luffy")
    assert rows.group.tolist() == [g for g in range(4) for _ in range(4)]
    for row, group in enumerate(rows.group.tolist()):
        ids = rows.input_ids[row, rows.prompt_length :][rows.mask[row]].tolist()
        example = trainer.corpus.train[group]
        if row % 4 == 3:
            assert ids == list(example.input_ids[len(example.prompt_ids) :])
            assert torch.equal(rows.given[row], rows.mask[row]) and rows.score[row] == 1 and rows.ended[row]
        else:
            old = rollout.input_ids[3 * group + row % 4, rollout.prompt_length :][rollout.mask[3 * group + row % 4]]
            assert ids == old.tolist() and not rows.given[row].any()
        prompt = rows.input_ids[row, : rows.prompt_length][rows.attention_mask[row, : rows.prompt_length]]
        assert prompt.tolist() == list(example.prompt_ids)


def test_a_prompt_without_a_target_has_its_responses_alone(tokenizer):
    rows = [*ROWS[:3], {"prompt": "the w7", "target": ""}]
    _, learnt = rolled(trainer_of(tokenizer, rows), "luffy")
    assert learnt.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 3


def test_the_loss_of_luffy(tokenizer):
    trainer = trainer_of(tokenizer, objectives={"luffy": {"gamma": 0.2}})
    _, rows = rolled(trainer, "luffy")
    total, given = 0.0, rows.given.any(1).tolist()
    for (logprob, _), a, is_given in zip(Plain(trainer, rows).rows, advantages(rows), given, strict=True):
        # Before the first update every ratio of a drawn token is 1.
        total += sum(-a * (math.exp(x) / (math.exp(x) + 0.2) if is_given else 1.0) for x in logprob)
    assert loss_of(trainer, "luffy", rows) == pytest.approx(total / rows.num_tokens, rel=1e-4)


def test_the_loss_of_srft(tokenizer):
    trainer = trainer_of(tokenizer)
    _, rows = rolled(trainer, "srft")
    given, num_given = rows.given.any(1).tolist(), int(rows.given.sum())
    total = 0.0
    for row, ((logprob, entropy), a) in enumerate(zip(Plain(trainer, rows).rows, advantages(rows), strict=True)):
        h = sum(entropy) / len(entropy)
        if given[row]:
            total += sum(-0.5 * math.exp(-h) * x for x in logprob) / num_given
            total += sum(-a * math.exp(x) / (math.exp(x) + 0.1) for x in logprob) / rows.num_tokens
        else:
            weight = 0.1 * math.exp(h) if rows.score[row] == 1 else -1.0
            total += sum(-weight * x for x in logprob) / rows.num_tokens
    assert loss_of(trainer, "srft", rows) == pytest.approx(total, rel=1e-4)


def test_the_loss_of_hpt_and_which_prompts_it_imitates(tokenizer):
    trainer = trainer_of(tokenizer, objectives={"hpt": {"sft_coef": 0.7}})
    rollout, rows = rolled(trainer, "hpt")
    means = [sum(rollout.score[3 * g : 3 * g + 3].tolist()) / 3 for g in range(4)]
    assert means[0] == means[2] == 0 and max(means) > 0, "some prompts fail, and some do not"
    expected = [g for g in range(4) for _ in range(3 if means[g] > 0 else 1)]
    assert rows.group.tolist() == expected
    given = rows.given.any(1).tolist()
    assert given == [means[g] == 0 for g in expected]
    drawn, num_given = int((rows.mask & ~rows.given).sum()), int(rows.given.sum())
    # The advantages are of the responses alone: as they are in the rollout.
    whole, total = advantages(rollout), 0.0
    place = iter([i for i in range(12) if means[i // 3] > 0])
    for (logprob, _), is_given in zip(Plain(trainer, rows).rows, given, strict=True):
        if is_given:
            total += 0.7 * sum(-x for x in logprob) / num_given
        else:
            total += -whole[next(place)] * len(logprob) / drawn
    assert loss_of(trainer, "hpt", rows) == pytest.approx(total, rel=1e-4)


def test_hpt_learns_values_of_the_policys_own_tokens_alone(tokenizer):
    trainer = trainer_of(tokenizer, mixing={**OF, "objective": "hpt"}, advantage="gae")
    _, rows = rolled(trainer, "hpt")
    term = trainer.objectives["hpt"].term(rows)
    _, metrics = term.loss_of(term.rows)
    drawn = rows.mask & ~rows.given
    # The value head is new, and says 0: clipped or not, the error is the return.
    expected = 0.5 * (rows.return_[drawn].double() - rows.old_value[drawn].double()).square().sum() / int(drawn.sum())
    assert float(metrics["value_loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_where_no_prompt_fails_hpt_is_ppo_and_where_all_do_it_is_sft(tokenizer):
    trainer = trainer_of(tokenizer, objectives={"hpt": {"threshold": -1.0}})
    rollout, rows = rolled(trainer, "hpt")
    ppo = with_advantages(rollout, trainer.config.ppo)
    assert loss_of(trainer, "hpt", rows) == loss_of(trainer, "ppo", ppo)
    trainer = trainer_of(tokenizer, objectives={"hpt": {"threshold": 2.0}})
    trainer.config = replace(trainer.config, sampling=replace(trainer.config.sampling, temperature=1.0))
    _, rows = rolled(trainer, "hpt")
    batch = trainer.batch(trainer.corpus.train[:4])
    assert loss_of(trainer, "hpt", rows) == pytest.approx(loss_of(trainer, "sft", batch), rel=1e-5)


def test_the_loss_of_prefix_rft(tokenizer):
    hints = (2, 0, 3, 4)
    mixing = {"strategy": "prefix_rft", "steps": 2}
    trainer = trainer_of(tokenizer, mixing=mixing, objectives={"prefix_rft": {"share": 0.5}})
    rollout, rows = rolled(trainer, "prefix_rft", prefixed(trainer, hints))
    assert rollout.group.tolist() == [g for g in range(4) for _ in range(3)]
    assert rows.given.sum(1).tolist() == [h for hint in hints for h in (0, 0, hint)]
    # The rewards read hint and response as one.
    scores = [rollout.score[i].item() for i in range(12)]
    assert rows.score.tolist() == scores and all(scores[3 * g + 2] == 1 for g in (0, 2, 3))
    plain = Plain(trainer, rows).rows
    entropies = sorted((h for row, hint in zip(plain[2::3], hints, strict=True) for h in row[1][:hint]), reverse=True)
    least = entropies[math.ceil(0.5 * len(entropies)) - 1]
    total = 0.0
    for row, ((logprob, entropy), a) in enumerate(zip(plain, advantages(rows), strict=True)):
        hint = hints[row // 3] if row % 3 == 2 else 0
        chosen = [t >= hint or entropy[t] >= least - 1e-6 for t in range(len(logprob))]
        total += -a * sum(chosen)
    assert loss_of(trainer, "prefix_rft", rows) == pytest.approx(total / rows.num_tokens, rel=1e-4)


def test_a_hints_tokens_are_pushed_and_the_surest_are_not(tokenizer):
    """Their gradient, by the log-probs themselves."""
    from hybrid.objectives.prefix_rft import _term

    trainer = trainer_of(tokenizer, mixing={"strategy": "prefix_rft", "steps": 2})
    _, rows = rolled(trainer, "prefix_rft", prefixed(trainer, (3, 3, 3, 3)))
    objective = trainer.objectives["prefix_rft"]
    least = objective.policy_term(rows).keywords["least"]
    logprob = rows.old_logprob.clone().requires_grad_()
    _term(logprob, rows, trainer.config.ppo, objective.divisors(rows), least=least)[0].backward()
    pushed = (logprob.grad != 0) & rows.given
    of_use = rows.given & (rows.advantage != 0)
    # 20 % of 12 tokens, rounded up.
    assert int((rows.given & (rows.entropy >= least)).sum()) == 3
    assert torch.equal(pushed, of_use & (rows.entropy >= least))


def test_without_hints_prefix_rft_is_ppo(tokenizer):
    trainer = trainer_of(tokenizer)
    rollout, rows = rolled(trainer, "prefix_rft")
    ppo = with_advantages(rollout, trainer.config.ppo)
    assert loss_of(trainer, "prefix_rft", rows) == loss_of(trainer, "ppo", ppo)


def test_importance_weights_leave_what_nobody_drew_as_it_is(tokenizer):
    mixing = {"strategy": "prefix_rft", "steps": 2}
    losses = []
    for importance in (None, "token"):
        trainer = trainer_of(tokenizer, mixing=mixing, importance=importance)
        _, rows = rolled(trainer, "prefix_rft", prefixed(trainer, (2, 2, 2, 2)))
        losses.append(loss_of(trainer, "prefix_rft", rows))
        luffy = trainer_of(tokenizer, importance=importance)
        losses.append(loss_of(luffy, "luffy", rolled(luffy, "luffy")[1]))
    # Plain sampling draws from the policy itself.
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-4)


def test_a_dialogue_that_ends_with_a_question_has_no_demonstration(tokenizer):
    """Its earlier turns are trained, and nothing stands behind its prompt."""
    trainer = trainer_of(tokenizer, objectives={"hpt": {"threshold": 2.0}})
    first, *others = trainer.corpus.train[:4]
    examples = [e for e in (replace(first, prompt_ids=first.input_ids), *others) for _ in range(3)]
    _, rows = rolled(trainer, "hpt", examples)
    assert rows.group.tolist() == [0, 0, 0, 1, 2, 3] and not rows.given[:3].any()
    _, rows = rolled(trainer, "luffy", examples)
    assert rows.group.tolist() == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4


def test_of_a_target_only_what_is_trained_is_learnt(tokenizer):
    """Its second token is a user's, say, and so are those behind its third."""
    trainer = trainer_of(tokenizer, objectives={"hpt": {"threshold": 2.0}})
    trainer.config = replace(trainer.config, sampling=replace(trainer.config.sampling, temperature=1.0))
    examples = []
    for e in trainer.corpus.train[:4]:
        untrained = {len(e.prompt_ids) + 1, *range(len(e.prompt_ids) + 3, len(e.labels))}
        labels = tuple(IGNORE if t in untrained else label for t, label in enumerate(e.labels))
        examples.append(replace(e, labels=labels))
    _, rows = rolled(trainer, "hpt", [e for e in examples for _ in range(3)])
    assert torch.equal(rows.given, rows.mask) and rows.mask.sum(1).tolist() == [2] * 4
    assert loss_of(trainer, "hpt", rows) == pytest.approx(loss_of(trainer, "sft", trainer.batch(examples)), rel=1e-5)
    trainer = trainer_of(tokenizer)
    _, rows = rolled(trainer, "luffy", [e for e in examples for _ in range(3)])
    assert rows.given.sum(1).tolist() == [0, 0, 0, 2] * 4
    given = rows.given.any(1)
    # The reward came with the last token that is learnt.
    assert rows.reward[given][:, 2].tolist() == rows.score[given].tolist()


def test_a_target_that_the_reward_skips_is_no_demonstration(tokenizer):
    trainer = trainer_of(tokenizer)
    state, score = trainer.reward.state_dict(), trainer.reward.score
    rollout = trainer.rollout(trainer.corpus.train[:4])

    def skipping(texts, *rest):
        found = score(texts, *rest)
        found[1] = math.nan
        return found

    trainer.reward.score = skipping
    rows = trainer.objectives["luffy"].learnt(with_advantages(rollout, trainer.config.ppo))
    assert [int((rows.group == g).sum()) for g in range(4)] == [4, 3, 4, 4]
    assert trainer.reward.state_dict() == state


@pytest.mark.slow
@pytest.mark.parametrize("name", ["luffy", "srft", "hpt"])
def test_what_a_policy_never_finds_is_learnt_from_its_demonstrations(name, tokenizer):
    """The control is PPO, whose responses all score 0: it learns nothing."""

    def only_the_target(response, target):
        return float(response == target)

    rewards = {}
    for objective in (name, "ppo"):
        mixing = {"strategy": "objective", "objective": objective, "steps": 60}
        trainer = trainer_of(tokenizer, ROWS[:1] * 4, only_the_target, mixing=mixing)
        trainer.train()
        rewards[objective] = trainer.rollout(trainer.corpus.train[:4]).score.mean().item()
    assert rewards["ppo"] == 0.0
    assert rewards[name] > 0.5


def test_a_rollout_by_hand_needs_its_examples(tokenizer):
    trainer = trainer_of(tokenizer)
    rollout = with_advantages(trainer.rollout(trainer.corpus.train[:4]), trainer.config.ppo)
    with pytest.raises(InputError, match="objective 'luffy' needs the examples that a rollout answers"):
        trainer.objectives["luffy"].learnt(rollout[:6])


@pytest.mark.parametrize("name", ["luffy", "srft", "hpt"])
@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"ppo": {}}, r"ppo\.samples_per_prompt must be at least 2, got 1"),
        (
            {"ppo": {"samples_per_prompt": 2, "advantage": "group", "resample": 1}},
            r"ppo\.resample = 1 leaves those out",
        ),
        ({"ppo": {"samples_per_prompt": 2, "advantage": "group"}, "score": {"whiten": True}}, r"score\.whiten takes"),
        (
            {"ppo": {"samples_per_prompt": 2, "advantage": "group"}, "memory": {"type": "experience", "staleness": 2}},
            r"memory\.staleness = 2 is for objective 'ppo'",
        ),
    ],
)
def test_what_no_demonstration_can_stand_beside_is_refused_before_a_model_is_loaded(name, section, said):
    with pytest.raises(InputError, match=said):
        HybridConfig.from_dict({"mixing": {**OF, "objective": name}, **section})


@pytest.mark.parametrize(
    ("mixing", "ppo", "objectives", "said"),
    [
        ({**OF, "objective": "luffy"}, {}, {}, r"objective 'luffy' compares .* got 'gae'"),
        ({**OF, "objective": "srft"}, {}, {}, r"objective 'srft' compares .* got 'gae'"),
        ({"strategy": "prefix_rft"}, {}, {}, r"objective 'prefix_rft' compares .* got 'gae'"),
        ({"strategy": "prefix_rft", "prefixed": 2}, {"advantage": "group"}, {}, r"prefixed must be less .* = 2, got 2"),
        ({"strategy": "prefix_rft", "final_share": 0.99}, {}, {}, r"mixing\.final_share must lie in \[0\.0, 0\.95\]"),
        ({}, {}, {"luffy": {"gamma": 0.0}}, r"objectives\.luffy: gamma must be > 0"),
        ({}, {}, {"srft": {"rl_weight": -1.0}}, r"objectives\.srft: rl_weight must be >= 0"),
        ({}, {}, {"hpt": {"sft_coef": -1.0}}, r"objectives\.hpt: sft_coef must be >= 0"),
        ({}, {}, {"prefix_rft": {"share": 0.0}}, r"objectives\.prefix_rft: share must lie in \(0, 1\]"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(mixing, ppo, objectives, said):
    ppo = {"samples_per_prompt": 2, **ppo}
    with pytest.raises(InputError, match=said):
        HybridConfig.from_dict({"mixing": mixing, "ppo": ppo, "objectives": objectives})


@pytest.mark.parametrize(
    "mixing", [{**OF, "objective": "luffy"}, {**OF, "objective": "hpt"}, {"strategy": "prefix_rft"}]
)
def test_prompts_without_any_demonstration_are_refused_before_a_model_is_loaded(mixing, tokenizer, monkeypatch):
    monkeypatch.setattr("hybrid.learner.build_models", lambda *given: pytest.fail("a model was made"))
    rows = [{"prompt": row["prompt"], "target": ""} for row in ROWS]
    with pytest.raises(InputError, match=r"learns from demonstrations.*none of the 6 training examples has one"):
        trainer_of(tokenizer, rows, mixing=mixing)


def test_a_strategy_that_is_put_in_later_finds_no_demonstrations_either(tokenizer):
    rows = [{"prompt": row["prompt"], "target": ""} for row in ROWS]
    trainer = trainer_of(tokenizer, rows, mixing={"strategy": "sequential", "sft_steps": 0})
    trainer.strategy = make_strategy({**OF, "objective": "luffy"})
    with pytest.raises(InputError, match="this mixture learns from targets, and none of the 6 examples"):
        trainer.train()
