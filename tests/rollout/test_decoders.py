"""Decoders against the distributions they claim, on a model of three tokens whose responses are all enumerated."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from tiny import tiny_policy
from toy import EOS, TableJudge, ToyPolicy, exact_logprob, random_table, sequences, shares, total_variation, toy_asked

from hybrid.core import InputError
from hybrid.rollout import SamplingConfig, asked, make_decoder

PROMPT, LENGTH = (1,), 3
TABLE = random_table(LENGTH, PROMPT)
ALL = sequences(LENGTH)
LOG_P = torch.tensor([exact_logprob(TABLE, PROMPT, y) for y in ALL], dtype=torch.float64)
# No two responses have the same reward.
REWARD = torch.linspace(-1, 1, len(ALL), dtype=torch.float64)[
    torch.randperm(len(ALL), generator=torch.Generator().manual_seed(7))
]
JUDGE = TableJudge(dict(zip(ALL, REWARD.tolist(), strict=True)))
assert len(ALL) == 15
LIMIT = 0.02  # of the total variation, at MANY draws: sampling alone is about .01
MANY, FEWER, FEW = 12_000, 10_000, 2_000  # few: for what is far off


@pytest.fixture(autouse=True)
def large_parts(monkeypatch):
    """The toy's forwards cost what their number does, not their size."""
    monkeypatch.setattr(asked, "ROWS", 10**7)


def answers(spec, policy=None, *, prompt=PROMPT, judge=JUDGE, repeats=MANY, seed=0, **sampling):
    policy = ToyPolicy(TABLE) if policy is None else policy
    question = toy_asked(
        policy, prompt, judge=judge, repeats=repeats, seed=seed, **{"max_new_tokens": LENGTH, **sampling}
    )
    with torch.no_grad():
        return make_decoder(spec).answers(question)


def target(log_weight):
    return log_weight.softmax(0)


def test_the_toy_draws_from_its_own_table():
    assert math.isclose(float(LOG_P.exp().sum()), 1, rel_tol=1e-6)
    assert total_variation(shares(answers({"type": "sample"}), ALL), LOG_P.exp()) < LIMIT


TILTED, POWER = target(LOG_P + REWARD / 0.5), target(3 * LOG_P)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param({"type": "mcmc", "target": "tilted", "beta": 0.5, "steps": 25}, TILTED, marks=pytest.mark.slow),
        pytest.param({"type": "mcmc", "target": "power", "alpha": 3.0, "steps": 25}, POWER, marks=pytest.mark.slow),
        pytest.param(
            {"type": "mcmc", "target": "power", "alpha": 3.0, "steps": 30, "proposal_temperature": 1.0},
            POWER,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"type": "mcmc", "target": "tilted", "beta": 0.5, "steps": 25, "block": 1}, TILTED, marks=pytest.mark.slow
        ),
        pytest.param({"type": "mcmc", "alpha": 3.0, "steps": 25, "block": 2}, POWER, marks=pytest.mark.slow),
        pytest.param({"type": "smc", "target": "tilted", "beta": 0.5, "n": 32}, TILTED, marks=pytest.mark.slow),
        pytest.param({"type": "smc", "target": "power", "alpha": 3.0, "n": 32}, POWER, marks=pytest.mark.slow),
        ({"type": "best_of_n", "n": 4}, None),
    ],
)
def test_a_decoder_reaches_the_distribution_that_it_claims(spec, expected):
    if expected is None:
        below = torch.stack([LOG_P.exp()[r > REWARD].sum() for r in REWARD])
        expected = (below + LOG_P.exp()) ** 4 - below**4
    found = shares(answers(spec, repeats=FEWER if spec["type"] == "smc" else MANY), ALL)
    assert total_variation(found, expected) < LIMIT
    # What a decoder that does nothing would give is far from it.
    assert total_variation(LOG_P.exp(), expected) > 5 * LIMIT


def test_block_by_block_a_chain_arrives_in_fewer_steps():
    spec = {"type": "mcmc", "target": "power", "alpha": 3.0, "steps": 2, "proposal_temperature": 1.0}
    whole, blocks = (shares(answers({**spec, "block": block}, repeats=FEW), ALL) for block in (0, 1))
    assert total_variation(blocks, POWER) < 0.8 * total_variation(whole, POWER)
    # A block that holds everything is none.
    again = shares(answers({**spec, "block": LENGTH}, repeats=FEW), ALL)
    assert torch.equal(again, whole)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_mcmc_without_its_proposals_correction_reaches_something_else(monkeypatch, factor):
    from hybrid.rollout.decoders import mcmc

    spec = {"type": "mcmc", "target": "tilted", "beta": 0.5, "steps": 12, "proposal_temperature": factor}
    monkeypatch.setattr(mcmc, "_log_q_behind", lambda rows, cut: torch.zeros(len(rows), dtype=torch.float64))
    assert total_variation(shares(answers(spec, repeats=FEW), ALL), TILTED) > 5 * LIMIT


@pytest.mark.slow
def test_mcmc_without_the_correction_of_its_cuts_reaches_something_else(monkeypatch):
    from hybrid.rollout.decoders import mcmc

    # The shortest has a fourth of all, and is seldom proposed.
    reward = torch.tensor([1.0 if len(y) == 1 else 0.0 for y in ALL], dtype=torch.float64)
    judge, expected = TableJudge(dict(zip(ALL, reward.tolist(), strict=True))), target(LOG_P + reward / 0.5)
    spec = {"type": "mcmc", "target": "tilted", "beta": 0.5, "steps": 50}
    assert total_variation(shares(answers(spec, judge=judge), ALL), expected) < LIMIT
    monkeypatch.setattr(mcmc, "_log_cuts", lambda rows: torch.zeros(len(rows), dtype=torch.float64))
    assert total_variation(shares(answers(spec, judge=judge, repeats=FEW), ALL), expected) > 5 * LIMIT


def test_too_few_particles_are_biased():
    spec = {"type": "smc", "target": "tilted", "beta": 0.5, "n": 2}
    assert total_variation(shares(answers(spec), ALL), TILTED) > 2 * LIMIT


@pytest.mark.slow
def test_the_weights_of_smc_matter_where_it_never_resamples():
    spec = {"type": "smc", "target": "tilted", "beta": 0.5, "n": 32, "threshold": 0.0}
    found = answers(spec, repeats=FEWER)
    assert found.metrics["resampled"] == 0
    assert total_variation(shares(found, ALL), TILTED) < LIMIT


def soft_values(beta):
    """beta log E exp(r / beta) over what comes behind each beginning."""
    weight = (LOG_P + REWARD / beta).exp()
    values = {}
    for key in TABLE:
        inside = torch.tensor([y[: len(key) - 1] == key[1:] for y in ALL])
        values[key] = float(beta * (weight[inside].sum() / LOG_P[inside].exp().sum()).log())
    return values


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_smc_twisted_by_values_good_or_bad_reaches_the_rewards_target(sign, monkeypatch):
    from hybrid.rollout.decoders.smc import SMC

    spec = {"type": "smc", "target": "tilted", "by": "value", "beta": 0.5, "n": 32}
    policy = ToyPolicy(TABLE, {key: sign * value for key, value in soft_values(0.5).items()})
    assert total_variation(shares(answers(spec, policy, repeats=FEWER), ALL), TILTED) < LIMIT
    # Not where the reward has not the last word.
    monkeypatch.setattr(SMC, "_log_twist", lambda self, asked, *rows: asked.value(*rows).double() / self.beta)
    assert total_variation(shares(answers(spec, policy, repeats=FEW), ALL), TILTED) > 5 * LIMIT


# p(aa) = 0, p(ab) = .4, p(ba) = p(bb) = .25, and the rest on what no temperature below 1 or power prefers (facts of
# Karan & Du 2025, section 3: low temperature begins with b, the power prefers ab).
A, B = 0, 1
AB_TABLE = {
    (1,): torch.tensor([0.4, 0.5, 0.1]).log(),
    (1, A): torch.tensor([1e-12, 1.0, 1e-12]).log(),
    (1, B): torch.tensor([0.5, 0.5, 1e-12]).log(),
}


@pytest.mark.slow
def test_the_power_prefers_what_low_temperature_does_not():
    several = [(A, B), (B, A), (B, B), (EOS,)]
    alpha = 4.0
    log_p = torch.tensor([0.4, 0.25, 0.25, 0.1], dtype=torch.float64).log()
    expected, policy = target(alpha * log_p), ToyPolicy(AB_TABLE)
    for spec in (
        {"type": "mcmc", "alpha": alpha, "steps": 20},
        {"type": "smc", "target": "power", "alpha": alpha, "n": 32},
    ):
        found = shares(answers(spec, policy, repeats=FEWER, max_new_tokens=2), several)
        assert total_variation(found, expected) < LIMIT
        assert found.argmax() == 0
    cold = shares(answers({"type": "sample"}, policy, max_new_tokens=2, temperature=1 / alpha), several)
    assert cold[0] < cold[1] + cold[2]


@pytest.mark.slow
def test_a_chain_gives_several_responses_and_every_one_has_the_target():
    spec = {"type": "mcmc", "target": "tilted", "beta": 0.5, "steps": 6, "burn_in": 10, "chains": MANY // 4}
    found = answers(spec)
    assert len(found) == MANY
    # Four states of a chain are not independent: their shares scatter as fewer do.
    assert total_variation(shares(found, ALL), TILTED) < LIMIT
    assert 0 < found.metrics["acceptance_rate"] < 1


def test_a_chain_of_one_step_has_not_arrived():
    spec = {"type": "mcmc", "target": "tilted", "beta": 0.5, "steps": 1}
    assert total_variation(shares(answers(spec), ALL), TILTED) > 2 * LIMIT


def test_the_kl_of_best_of_n_is_below_its_bound():
    found = shares(answers({"type": "best_of_n", "n": 4}), ALL)
    kl = float((found * (found.clamp(min=1e-12).log() - LOG_P)).sum())
    bound = answers({"type": "best_of_n", "n": 4}, repeats=1).metrics["kl_bound"]
    assert bound == pytest.approx(math.log(4) - 3 / 4)
    assert 0.3 * bound < kl < bound


def best_values():
    """The largest reward that each beginning can still lead to: the value function of a policy that seeks it."""
    reward = dict(zip(ALL, REWARD.tolist(), strict=True))
    return {key: max(r for y, r in reward.items() if y[: len(key) - 1] == key[1:]) for key in TABLE}


BEST = ALL[int(REWARD.argmax())]


def test_value_guided_with_the_true_values_finds_the_optimum():
    spec = {"type": "value_guided", "width": 1, "branch": 3, "beta": 1e6, "ends_by": "reward"}
    assert answers(spec, ToyPolicy(TABLE, best_values()), repeats=1).lists() == [list(BEST)]


def test_value_guided_with_wrong_values_does_not():
    wrong = {key: -value for key, value in best_values().items()}
    spec = {"type": "value_guided", "width": 1, "branch": 3, "beta": 1e6, "ends_by": "reward"}
    assert answers(spec, ToyPolicy(TABLE, wrong), repeats=1).lists() != [list(BEST)]


@pytest.mark.parametrize(("width", "depth"), [(16, 1), (1, LENGTH)])
def test_a_beam_that_holds_everything_finds_the_best_of_log_p_and_reward(width, depth):
    spec = {"type": "value_guided", "width": width, "branch": 3, "depth": depth, "beta": 2.0, "ends_by": "reward"}
    wrong = {key: -5 * value for key, value in best_values().items()}
    expected = ALL[int((LOG_P + 2.0 * REWARD).argmax())]
    assert expected != ALL[int(LOG_P.argmax())]
    assert answers(spec, ToyPolicy(TABLE, wrong), repeats=1).lists() == [list(expected)]
    if width > 1:  # the best of the beam, in order
        order = (LOG_P + 2.0 * REWARD).argsort(descending=True)[:3]
        found = answers(spec, ToyPolicy(TABLE, wrong), repeats=3).lists()
        assert found == [list(ALL[i]) for i in order]


MCTS = {"type": "ppo_mcts", "ends_by": "reward", "branch": 3, "explore": 0.2}


def test_a_tree_by_the_true_values_finds_the_optimum_with_few_simulations():
    for simulations in (8, 64):
        found = answers({**MCTS, "simulations": simulations}, ToyPolicy(TABLE, best_values()), repeats=2)
        assert found.lists() == [list(BEST)] * 2
        assert found.ended.tolist() == [BEST[-1] == EOS] * 2


def test_a_tree_by_wrong_values_does_not():
    wrong = ToyPolicy(TABLE, {key: -3 * value for key, value in best_values().items()})
    assert answers({**MCTS, "simulations": 8}, wrong, repeats=1).lists() != [list(BEST)]


def test_a_tree_that_only_explores_takes_the_likeliest():
    found = answers({**MCTS, "explore": 1e6, "simulations": 64}, ToyPolicy(TABLE, best_values()), repeats=1)
    assert found.lists() == [list(ALL[int(LOG_P.argmax())])]


def test_tokens_are_drawn_by_the_visits_where_their_temperature_says_so():
    spec = {**MCTS, "simulations": 24, "visits_temperature": 1.0}
    found = answers(spec, ToyPolicy(TABLE, best_values()), repeats=300)
    best = found.lists().count(list(BEST)) / 300
    assert 1 / 15 < best < 1
    cold = answers({**spec, "visits_temperature": 0.2}, ToyPolicy(TABLE, best_values()), repeats=300)
    assert cold.lists().count(list(BEST)) / 300 > best


def test_the_edges_of_a_tree_by_hand():
    from hybrid.rollout.decoders.ppo_mcts import _back_up, _Node

    root, child, leaf = _Node([], 0.0), _Node([0], 0.0), _Node([0, 1], 4.0)
    root.expand(1.0, [(0, 0.5), (1, 0.5)])
    child.expand(2.0, [(0, 0.5), (1, 0.5)])
    _back_up([(root, 0), (child, -1)])
    assert (root.visits, root.q) == ([1, 0], [2.0, 1.0])
    _back_up([(root, 0), (child, 1), (leaf, -1)])
    assert (child.visits, child.q) == ([0, 1], [2.0, 4.0])
    assert (root.visits, root.q) == ([2, 0], [4.0, 1.0])


@pytest.mark.parametrize("kind", ["best_of_n", "reward_guided", "mcmc", "smc", "value_guided", "ppo_mcts"])
def test_a_stop_text_ends_a_response_wherever_its_parts_were_drawn(kind):
    """Over where the last two are 0, 0: also where the first was kept and the second drawn behind it."""
    repeats = 4 if kind == "value_guided" else 60
    policy, spec = ToyPolicy(TABLE, best_values()), {"type": kind}
    spec |= {"block": 1} if kind in ("reward_guided", "smc") else {}
    question = replace(
        toy_asked(policy, PROMPT, judge=JUDGE, repeats=repeats, max_new_tokens=LENGTH, temperature=3.0),
        is_over=lambda ids: list(ids[-2:]) == [0, 0],
    )
    with torch.no_grad():
        found = make_decoder(spec).answers(question)
    for ids, ended in zip(found.lists(), found.ended.tolist(), strict=True):
        assert all(ids[i : i + 2] != [0, 0] for i in range(len(ids) - 2))
        assert ended == (ids[-1] == EOS or ids[-2:] == [0, 0])
    if kind in ("mcmc", "smc"):
        assert [0, 0] in found.lists()


def test_without_a_reward_a_whole_response_counts_the_value_before_its_last_token():
    values = best_values()
    ended = LOG_P + torch.tensor([values[(*PROMPT, *y[:-1])] for y in ALL], dtype=torch.float64)
    spec = {"type": "value_guided", "width": 16, "branch": 3, "beta": 1.0}
    assert answers(spec, ToyPolicy(TABLE, values), judge=None, repeats=1).lists() == [list(ALL[int(ended.argmax())])]


def test_value_guided_says_so_where_the_value_head_says_nothing():
    with pytest.warns(UserWarning, match="value head gives 0"):
        answers({"type": "value_guided"}, judge=None, repeats=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers({"type": "value_guided"}, ToyPolicy(TABLE, best_values()), judge=None, repeats=1)


@pytest.mark.slow
def test_reward_guided_in_one_block_is_best_of_n_and_in_small_ones_is_not():
    below = torch.stack([LOG_P.exp()[r > REWARD].sum() for r in REWARD])
    expected = (below + LOG_P.exp()) ** 3 - below**3
    whole = shares(answers({"type": "reward_guided", "n": 3, "block": LENGTH}), ALL)
    assert total_variation(whole, expected) < LIMIT
    assert total_variation(shares(answers({"type": "reward_guided", "n": 3, "block": 1}), ALL), expected) > 2 * LIMIT


def test_reward_guided_takes_the_token_whose_beginning_is_worth_most():
    # Beginnings are judged too: (0, 1) before (0, 0), 0 before 1 and EOS.
    judge = TableJudge({(0,): 1.0, (0, 1): 2.0, (0, 1, EOS): 3.0})
    found = answers({"type": "reward_guided", "n": 64, "block": 1}, judge=judge, repeats=20)
    assert found.lists() == [[0, 1, EOS]] * 20


def test_best_of_n_by_the_value_head_takes_the_largest_value():
    # Values are asked before the last token: all that begin with 1, 0 win.
    values = dict.fromkeys(TABLE, 0.0) | {(*PROMPT, 1, 0): 5.0}
    found = answers({"type": "best_of_n", "n": 512, "by": "value"}, ToyPolicy(TABLE, values), judge=None, repeats=20)
    assert {tuple(ids[:2]) for ids in found.lists()} == {(1, 0)}


@pytest.mark.parametrize("kind", ["best_of_n", "reward_guided", "mcmc", "smc"])
def test_the_same_seed_finds_the_same(kind):
    first, again, other = (answers({"type": kind}, repeats=8, seed=seed, temperature=3.0) for seed in (3, 3, 4))
    assert torch.equal(first.ids, again.ids)
    assert first.lists() != other.lists()


@pytest.mark.parametrize("kind", ["best_of_n", "reward_guided", "mcmc", "smc", "value_guided", "ppo_mcts"])
def test_a_response_is_never_shorter_than_min_new_tokens(kind):
    values = best_values() if kind in ("value_guided", "ppo_mcts") else None
    repeats = 4 if kind == "value_guided" else 40
    found = answers({"type": kind}, ToyPolicy(TABLE, values), repeats=repeats, min_new_tokens=2)
    assert (found.lengths >= 2).all()
    assert (found.ended == torch.tensor([ids[-1] == EOS for ids in found.lists()])).all()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"type": "best_of_n", "n": 1}, "sampling.decoder.n must be at least 2, got 1"),
        ({"type": "reward_guided", "block": 0}, "sampling.decoder.block must be at least 1"),
        ({"type": "mcmc", "steps": 0}, "sampling.decoder.steps must be at least 1, got 0"),
        ({"type": "mcmc", "block": -1}, "sampling.decoder.block must be at least 0, got -1"),
        ({"type": "mcmc", "alpha": 0.0}, "sampling.decoder.alpha must be > 0"),
        ({"type": "smc", "threshold": 2.0}, r"sampling.decoder.threshold must lie in \[0, 1\]"),
        ({"type": "ppo_mcts", "simulations": 0}, "sampling.decoder.simulations must be at least 1"),
        ({"type": "value_guided", "width": 5000}, "must be at most 4096 candidates"),
        ({"type": "markov"}, "sampling.decoder.window is missing"),
        ({"type": "markov", "window": 0}, "sampling.decoder.window must be at least 1"),
        ({"type": "smc", "target": "power", "by": "value"}, "by means nothing with target 'power'"),
        ({"typ": "best_of_n"}, "sampling.decoder.typ: unknown parameter.*did you mean 'type'"),
        ({"type": "best_of_m"}, "best_of_n"),
        ({"type": "mcmc", "step": 3}, "steps"),
        ({"type": "mcmc", "reward": {"type": "length_window", "max": 9}}, "reward means nothing"),
        ({"type": "best_of_n", "reward": {"type": "lenght_window"}}, "length_window"),
        ("mcmc", "must be a mapping"),
    ],
)
def test_bad_input_is_refused_by_name(spec, said):
    with pytest.raises(InputError, match=said):
        SamplingConfig(decoder=spec)


@pytest.mark.parametrize("kind", ["best_of_n", "reward_guided", "mcmc", "smc"])
def test_what_needs_chance_refuses_temperature_0(kind):
    with pytest.raises(InputError, match=f"{kind}.*temperature > 0"):
        SamplingConfig(decoder={"type": kind}, temperature=0.0)


def test_what_is_proposed_never_leaves_the_models_context():
    policy, prompt = tiny_policy("gpt2").eval(), tuple(range(3, 63))
    context = policy.backbone.context_length
    room = context - len(prompt)
    # Chains that are cut in unlike places are drawn side by side, and a position past the last is an IndexError.
    whole = {"max_new_tokens": room, "min_new_tokens": room}
    found = answers({"type": "mcmc", "steps": 4}, policy, prompt=prompt, judge=None, repeats=8, **whole)
    assert found.lengths.tolist() == [room] * 8
