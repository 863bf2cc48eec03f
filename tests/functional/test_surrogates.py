"""The policy loss without clip, CISPO, and the importance correction, against loops of python floats."""

import math

import pytest
import torch

from hybrid.functional import importance_weight, policy_loss

TIGHT = 1e-10  # float64 sums over a dozen tokens
MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
VALID = MASK.nonzero().tolist()


def case(seed=0, spread=0.4):
    """logprob, old_logprob, advantage, (3, 5) each: about half of the ratios lie outside [0.8, 1.2]."""
    generator = torch.Generator().manual_seed(seed)
    noise, old_logprob, advantage = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)
    old_logprob = -old_logprob.abs()
    return old_logprob + spread * noise, old_logprob, advantage


def gradient_of(logprob, *rest, **options):
    logprob = logprob.clone().requires_grad_()
    policy_loss(logprob, *rest, MASK, **options)[0].backward()
    return logprob.grad


@pytest.mark.parametrize("clip", [0.2, 1.0, None])
@pytest.mark.parametrize("seed", range(2))
def test_cispo_equals_a_loop(seed, clip):
    logprob, old_logprob, advantage = case(seed)
    losses, gradient = [], torch.zeros_like(logprob)
    for b, t in VALID:
        ratio = math.exp(logprob[b, t] - old_logprob[b, t])
        kept = ratio if clip is None else min(max(ratio, 1 - clip), 1.4)
        losses.append(-kept * advantage[b, t].item() * logprob[b, t].item())
        gradient[b, t] = -kept * advantage[b, t] / len(VALID)
    options = {"surrogate": "cispo", "clip": clip, "clip_high": None if clip is None else 0.4}
    loss, _ = policy_loss(logprob, old_logprob, advantage, MASK, **options)
    assert loss.item() == pytest.approx(math.fsum(losses) / len(losses), abs=TIGHT)
    found = gradient_of(logprob, old_logprob, advantage, **options)
    torch.testing.assert_close(found, gradient, rtol=0, atol=TIGHT)


def test_cispo_leaves_every_token_its_gradient_where_ppo_silences_some():
    silent = {s: (gradient_of(*case(), surrogate=s)[MASK] == 0).sum().item() for s in ("ppo", "cispo")}
    assert silent["cispo"] == 0 < silent["ppo"]


def test_the_clip_fraction_of_cispo_counts_clipped_ratios_whatever_the_advantage():
    # Ratios 2, 1/2, 1.1 and 1: two outside [0.8, 1.2].
    logprob = torch.tensor([[2.0, 0.5, 1.1, 1.0]], dtype=torch.float64).log()
    _, metrics = policy_loss(logprob, torch.zeros(1, 4), torch.ones(1, 4), torch.ones(1, 4), surrogate="cispo")
    assert metrics["clip_fraction"].item() == 0.5


@pytest.mark.parametrize("surrogate", ["ppo", "cispo"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_before_any_update_every_surrogate_has_the_gradient_of_a2c(surrogate, clip):
    # One epoch and one minibatch of PPO is A2C: the ratio is 1, and the gradient that of -A logprob.
    logprob, _, advantage = case()
    found = gradient_of(logprob, logprob.clone(), advantage, surrogate=surrogate, clip=clip)
    expected = (-advantage / len(VALID)).masked_fill(~MASK, 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=TIGHT)


@pytest.mark.parametrize("seed", range(2))
def test_the_loss_without_clip_equals_a_loop(seed):
    logprob, old_logprob, advantage = case(seed)
    terms = [-advantage[b, t].item() * math.exp(logprob[b, t] - old_logprob[b, t]) for b, t in VALID]
    loss, metrics = policy_loss(logprob, old_logprob, advantage, MASK, clip=None)
    assert loss.item() == pytest.approx(math.fsum(terms) / len(terms), abs=TIGHT)
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"surrogate": "CISPO"}, "surrogate must be ppo or cispo"),
        ({"clip": None, "clip_high": 0.3}, "clip_high is 0.3, but clip is None"),
        ({"clip": None, "dual_clip": 3.0}, "dual_clip"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "dual_clip"),
        ({"weight": torch.ones(3, 4)}, "weight"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        policy_loss(*case(), MASK, **options)


@pytest.mark.parametrize("surrogate", ["ppo", "cispo"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_a_weight_scales_the_gradient_of_its_token_and_leaves_the_divisor(surrogate, aggregation):
    options = {"surrogate": surrogate, "aggregation": aggregation}
    weight = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = gradient_of(*case(), **options)
    torch.testing.assert_close(gradient_of(*case(), weight=weight, **options), weight * plain, rtol=0, atol=TIGHT)


def test_gradients_of_a_weighted_loss_pass_gradcheck():
    logprob, old_logprob, advantage = case()
    weight, _ = importance_weight(old_logprob, case(seed=1)[0], MASK)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old_logprob, advantage, MASK, weight=weight)[0], logprob.requires_grad_()
    )


def test_no_gradient_flows_into_a_weight():
    weight = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    logprob, *rest = case()
    policy_loss(logprob.requires_grad_(), *rest, MASK, weight=weight)[0].backward()
    assert weight.grad is None


def test_what_a_weight_is_outside_the_mask_reaches_nothing():
    poisoned = torch.ones(3, 5, dtype=torch.float64).masked_fill(~MASK, math.nan)
    assert torch.equal(gradient_of(*case(), weight=poisoned), gradient_of(*case()))


def importance_by_loop(old, sampling, level, mode, cap):
    weight, ratios = torch.zeros_like(old), torch.zeros_like(old)
    for b, t in VALID:
        tokens = [t] if level == "token" else [s for c, s in VALID if c == b]
        ratio = math.exp(math.fsum(old[b, s].item() - sampling[b, s].item() for s in tokens))
        if mode == "truncate":
            weight[b, t] = min(ratio, cap)
        else:
            weight[b, t] = ratio if 1 / cap <= ratio <= cap else 0.0
        ratios[b, t] = ratio
    return weight, ratios


LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])
MODES = pytest.mark.parametrize("mode", ["truncate", "mask"])


@LEVELS
@MODES
@pytest.mark.parametrize("cap", [1.3, 2.0])
@pytest.mark.parametrize("seed", range(2))
def test_importance_weights_equal_a_loop(level, mode, cap, seed):
    old, sampling, _ = case(seed)
    expected, ratios = importance_by_loop(old, sampling, level, mode, cap)
    weight, metrics = importance_weight(old, sampling, MASK, level=level, mode=mode, cap=cap)
    torch.testing.assert_close(weight, expected, rtol=0, atol=TIGHT)
    cut = sum(weight[b, t].item() != pytest.approx(ratios[b, t].item(), abs=TIGHT) for b, t in VALID)
    assert {name: x.item() for name, x in metrics.items()} == pytest.approx(
        {
            "importance_mean": ratios.sum().item() / len(VALID),
            "importance_max": ratios.max().item(),
            "importance_cut_fraction": cut / len(VALID),
        },
        abs=TIGHT,
    )


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [
        ("token", "truncate", [[2.0, 0.25, 1.5]]),
        ("token", "mask", [[0.0, 0.0, 1.5]]),
        ("sequence", "truncate", [[1.5, 1.5, 1.5]]),
        ("sequence", "mask", [[1.5, 1.5, 1.5]]),
    ],
)
def test_importance_weights_by_hand(level, mode, expected):
    # Ratios 4, 1/4 and 3/2, whose product is 3/2; the cap is 2.
    old = torch.tensor([[4.0, 0.25, 1.5]], dtype=torch.float64).log()
    weight, _ = importance_weight(old, torch.zeros(1, 3), torch.ones(1, 3), level=level, mode=mode)
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64))


@LEVELS
@MODES
def test_equal_log_probs_weigh_one_exactly(level, mode):
    old = case()[1].float()
    weight, metrics = importance_weight(old, old.clone(), MASK, level=level, mode=mode, cap=1.0)
    assert torch.equal(weight, MASK.float())
    assert metrics["importance_cut_fraction"] == 0


@LEVELS
@MODES
@pytest.mark.parametrize("gap", [200.0, -200.0, math.inf])
def test_log_probs_far_apart_overflow_nothing(level, mode, gap):
    sampling = torch.full((2, 40), -gap)
    weight, metrics = importance_weight(torch.zeros(2, 40), sampling, torch.ones(2, 40), level=level, mode=mode)
    assert weight.isfinite().all()
    assert all(metric.isfinite() for metric in metrics.values())


@LEVELS
def test_what_stands_outside_the_mask_reaches_no_importance_weight(level):
    old, sampling, _ = case()
    weight, metrics = importance_weight(old, sampling, MASK, level=level)
    poisoned = [x.masked_fill(~MASK, math.nan) for x in (old, sampling)]
    again, metrics_again = importance_weight(*poisoned, MASK, level=level)
    assert torch.equal(again, weight)
    assert metrics_again == metrics


def test_importance_weights_have_no_gradient():
    old, sampling, _ = (x.requires_grad_() for x in case())
    weight, metrics = importance_weight(old, sampling, MASK)
    assert not any(x.requires_grad for x in (weight, *metrics.values()))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"cap": 0.9}, "cap must be >= 1"), ({"level": "row"}, "got 'row'"), ({"mode": "clip"}, "'clip'")],
)
def test_an_importance_weight_that_is_not_known_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        importance_weight(*case()[:2], MASK, **options)


def test_a_weighted_mean_over_the_sampled_distribution_is_the_mean_over_the_policys():
    # What the correction is for: E_sampling[w f] = E_policy[f], here over one token's whole vocabulary.
    policy, sampling, f = torch.randn(3, 1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy, sampling = policy.log_softmax(-1), sampling.log_softmax(-1)
    weight, _ = importance_weight(policy, sampling, torch.ones(1, 50), cap=math.inf)
    torch.testing.assert_close((sampling.exp() * weight * f).sum(), (policy.exp() * f).sum())
