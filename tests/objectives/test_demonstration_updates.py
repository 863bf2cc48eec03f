"""Objectives luffy, srft, hpt and prefix_rft away from the first update, by any ratio, average and microbatch."""

import math
from dataclasses import replace

import pytest
import torch
from demonstration_case import OF, Plain, loss_of, prefixed, rolled, trainer_of
from torch.amp import GradScaler

from hybrid.objectives.accumulate import accumulate, on_host

NAMES = ("luffy", "srft", "hpt", "prefix_rft")
AVERAGES = {"token_mean": None, "sequence_mean": None, "fixed_length": 7}
HINTS = (2, 0, 3, 4)


def moved(tokenizer, name, aggregation="token_mean", **ppo):
    """(the trainer, the rollout, its rows as if an earlier policy had scored them and another one drawn them)."""
    mixing = {"strategy": "prefix_rft", "steps": 2} if name == "prefix_rft" else {**OF, "objective": name}
    trainer = trainer_of(
        tokenizer, mixing=mixing, objectives={"prefix_rft": {"share": 0.5}}, advantage="leave_one_out", clip=0.1,
        clip_high=0.3, importance="token", aggregation=aggregation, fixed_length=AVERAGES[aggregation], **ppo,
    )  # fmt: skip
    rollout, rows = rolled(trainer, name, prefixed(trainer, HINTS) if name == "prefix_rft" else None)
    old, drawn = 0.3 * torch.randn(2, *rows.mask.shape, generator=torch.Generator().manual_seed(0))
    old_logprob = rows.old_logprob + old * rows.mask
    # A hint was drawn by nobody.
    sampled = torch.where(rows.given, old_logprob, rows.sampling_logprob + drawn * rows.mask)
    return trainer, rollout, replace(rows, old_logprob=old_logprob, sampling_logprob=sampled)


def left_out(rollout):
    """Each score against the mean of the others of its group."""
    found = []
    for i, group in enumerate(rollout.group.tolist()):
        others = [x for j, x in enumerate(rollout.score.tolist()) if j != i and rollout.group[j] == group]
        found.append(rollout.score[i].item() - sum(others) / len(others))
    return found


def by_hand(trainer, name, rollout, rows, ratio, aggregation):
    """The loss, token by token."""
    given = rows.given.any(1).tolist()
    lengths, num_given = rows.mask.sum(1).tolist(), int(rows.given.sum())
    a = left_out(rollout if name == "hpt" else rows)
    if name == "hpt":
        own = iter([x for i, x in enumerate(a) if rollout.score[rollout.group == rollout.group[i]].mean() > 0])
        a = [0.0 if is_given else next(own) for is_given in given]
    counted = [i for i in range(len(rows)) if not (name == "hpt" and given[i])]
    whole = sum(lengths[i] for i in counted) if aggregation == "token_mean" else len(counted)
    whole *= AVERAGES[aggregation] or 1
    hints = sorted(rows.entropy[rows.given].tolist(), reverse=True)
    total = 0.0
    for i, (logprob, _) in enumerate(Plain(trainer, rows).rows):
        old, sampled, h = (x[i][rows.mask[i]].tolist() for x in (rows.old_logprob, rows.sampling_logprob, rows.entropy))
        mean, divisor = sum(h) / lengths[i], whole * (lengths[i] if aggregation == "sequence_mean" else 1)
        change = [x - y for x, y in zip(logprob, old, strict=True)]
        for t, x in enumerate(logprob):
            if given[i] and name == "hpt":
                total -= x / num_given
            elif given[i] and name != "prefix_rft":
                total -= a[i] * math.exp(x) / (math.exp(x) + 0.1) / divisor
                total -= 0.5 * math.exp(-mean) * x / num_given if name == "srft" else 0.0
            else:
                weight = min(math.exp(old[t] - sampled[t]), 2.0) / divisor
                if name == "srft":
                    total -= (0.1 * math.exp(mean) if rows.score[i] == 1 else -1.0) * x * weight
                elif not (rows.given[i, t] and h[t] < hints[math.ceil(0.5 * len(hints)) - 1]):
                    r = math.exp(change[t] if ratio == "token" else sum(change) / lengths[i])
                    total -= min(a[i] * r, a[i] * min(max(r, 0.9), 1.3)) * weight
    return total


@pytest.mark.parametrize("aggregation", AVERAGES)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_moved_rows_equals_a_loop(name, ratio, aggregation, tokenizer):
    trainer, rollout, rows = moved(tokenizer, name, aggregation, ratio=ratio)
    expected = by_hand(trainer, name, rollout, rows, ratio, aggregation)
    # 2e-4: the policy's float32 against float64 sums.
    assert loss_of(trainer, name, rows) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("aggregation", AVERAGES)
@pytest.mark.parametrize("name", NAMES)
def test_microbatches_give_the_gradient_and_the_metrics_of_the_whole(name, aggregation, tokenizer):
    found = []
    for size in (None, 3):
        trainer, _, rows = moved(tokenizer, name, aggregation, microbatch_size=size, entropy_coef=0.1)
        parts = accumulate(trainer.optimizer, [trainer.objectives[name].term(rows)], GradScaler(enabled=False), {})
        gradient = torch.cat([x.grad.flatten() for x in trainer.policy.parameters() if x.grad is not None])
        found.append((gradient, on_host(parts, gradient[0])[0][0]))
    (whole, metrics), (summed, of_parts) = found
    torch.testing.assert_close(summed, whole, rtol=1e-3, atol=1e-6)  # float32 sums in another order
    assert of_parts == pytest.approx(metrics, rel=1e-3, abs=1e-6)


def test_target_kl_ends_the_passes_of_several_objectives_too(tokenizer, monkeypatch):
    coefs = {"luffy": 1.0, "hpt": 1.0}
    trainer = trainer_of(tokenizer, mixing={"strategy": "blend", "steps": 1, "coefs": coefs}, epochs=4, target_kl=1e-6)
    rollout, updates, update = trainer.rollout(trainer.corpus.train[:4]), [], trainer.update
    monkeypatch.setattr(trainer, "update", lambda terms: updates.append(update(terms)) or updates[-1])
    trainer.rollout_step(rollout, coefs)
    # Before the first update there is no change yet; it makes one.
    assert len(updates) == 2
