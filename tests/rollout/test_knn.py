"""Decoder `knn` against the mixture that it claims, on a model of three tokens whose responses are all enumerated."""

import math

import pytest
import torch
from toy import EOS, ToyPolicy, exact_logprob, random_table, sequences, shares, total_variation, toy_asked

from hybrid.core import IGNORE, Batch, InputError
from hybrid.memory import DatastoreInfo, filled_datastore
from hybrid.rollout import SamplingConfig, make_decoder

PROMPT, LENGTH, TAU, K = (1,), 3, 0.5, 5
TABLE = random_table(LENGTH, PROMPT)
VALUES = {key: i / 10 for i, key in enumerate(TABLE)}  # the hidden state's last number
ALL = sequences(LENGTH)
LIMIT, MANY = 0.02, 12_000  # as in test_decoders


class Letters:
    def get_vocab(self):
        return {"a": 0, "b": 1, ".": EOS}


class Other(Letters):
    def get_vocab(self):
        return {"b": 0, "a": 1, ".": EOS}


def state(beginning):
    """The hidden state behind a beginning, a list."""
    return [*TABLE[beginning].tolist(), VALUES[beginning]]


@pytest.fixture(scope="module")
def policy():
    return ToyPolicy(TABLE, VALUES)


def memory():
    """(key, token) pairs near the states of the toy, in which a few tokens are overdone."""
    generator = torch.Generator().manual_seed(3)
    keys = [torch.tensor(state(key)) + 0.3 * torch.randn(4, generator=generator) for key in TABLE for _ in range(4)]
    return torch.stack(keys), torch.randint(0, 3, (len(keys),), generator=generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, policy):
    folder = tmp_path_factory.mktemp("knn") / "store"
    info = DatastoreInfo.of("toy", policy.backbone, Letters(), hidden_size=4, dtype="float32")
    with filled_datastore(folder, info) as add:
        add(*memory())
    return str(folder)


def spec(folder, **settings):
    return {"type": "knn", "datastore": folder, "k": K, "temperature": TAU, **settings}


def answers(decoder, policy, *, repeats=MANY, **sampling):
    question = toy_asked(policy, PROMPT, repeats=repeats, **{"max_new_tokens": LENGTH, **sampling})
    with torch.no_grad():
        return make_decoder(decoder).answers(question)


def mixed_table(lam):
    """The toy's table, mixed by hand."""
    keys, tokens = (x.tolist() for x in memory())
    table = {}
    for beginning, row in TABLE.items():
        hidden = state(beginning)
        squared = [sum((a - b) ** 2 for a, b in zip(hidden, key, strict=True)) for key in keys]
        near = sorted(range(len(keys)), key=squared.__getitem__)[:K]
        mass = [0.0, 0.0, 0.0]
        for i in near:
            mass[tokens[i]] += math.exp(-squared[i] / TAU)
        p = [(1 - lam) * math.exp(z) + lam * m / sum(mass) for z, m in zip(row.double().tolist(), mass, strict=True)]
        table[beginning] = torch.tensor(p, dtype=torch.float64).log()
    return table


def probabilities(table, temperature=1.0):
    return torch.tensor([exact_logprob(table, PROMPT, y, temperature) for y in ALL], dtype=torch.float64).exp()


@pytest.mark.parametrize(("lam", "temperature"), [(0.6, 1.0), (1.0, 1.0), (0.6, 0.5)])
def test_responses_come_as_often_as_the_mixture_says(policy, folder, lam, temperature):
    expected = probabilities(mixed_table(lam), temperature)
    assert float(expected.sum()) == pytest.approx(1)
    found = shares(answers(spec(folder, lam=lam), policy, temperature=temperature), ALL)
    assert total_variation(found, expected) < LIMIT
    assert total_variation(probabilities(TABLE, temperature), expected) > 5 * LIMIT


def test_each_tokens_log_prob_is_the_mixtures(policy, folder):
    found, table = answers(spec(folder, lam=0.6), policy, repeats=50), mixed_table(0.6)
    for ids, row in zip(found.lists(), found.logprob.tolist(), strict=True):
        expected = [float(table[(*PROMPT, *ids[:n])][token]) for n, token in enumerate(ids)]
        assert row[: len(ids)] == pytest.approx(expected, abs=1e-5)


def test_temperature_0_takes_the_likeliest_of_the_mixture(policy, folder):
    table, ids = mixed_table(0.9), []
    while len(ids) < LENGTH and EOS not in ids:
        ids.append(int(table[(*PROMPT, *ids)].argmax()))
    greedy = answers(spec(folder, lam=0.9), policy, repeats=2, temperature=0.0)
    assert greedy.lists() == [ids, ids]
    assert greedy.lists() != answers({"type": "sample"}, policy, repeats=2, temperature=0.0).lists()


def test_lam_0_is_sample_bit_for_bit(policy, folder):
    plain, found = (answers(s, policy, repeats=500) for s in ({"type": "sample"}, spec(folder, lam=0.0)))
    for name in ("ids", "mask", "ended", "logprob"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    # Through the mixture's own arithmetic the same tokens come, and the same numbers to rounding.
    tiny = answers(spec(folder, lam=1e-12), policy, repeats=500)
    assert torch.equal(tiny.ids, plain.ids)
    torch.testing.assert_close(tiny.logprob, plain.logprob)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_labels_have_the_log_prob_of_the_mixture(policy, folder, lam):
    """Of rows of different lengths, of which the prompt is not trained."""
    rows = [(*PROMPT, 0, 1, EOS), (*PROMPT, 1, EOS)]
    ids = torch.tensor([[*row, *[0] * (4 - len(row))] for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (4 - len(row)) for row in rows])
    labels = ids.masked_fill(~mask, IGNORE)
    labels[:, 0] = IGNORE
    logprob, trained = make_decoder(spec(folder, lam=lam)).batch_logprob(policy, Batch(ids, mask, labels))
    table = TABLE if lam == 0 else mixed_table(lam)
    for n, row in enumerate(rows):
        expected = [float(table[row[:i]][row[i]]) for i in range(1, len(row))]
        assert logprob[n, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
        assert trained[n].tolist() == [True] * len(expected) + [False] * (3 - len(expected))
    assert (logprob[~trained] == 0).all()


def test_another_tokenizer_or_policy_is_refused_by_name(policy, folder):
    decoder = make_decoder(spec(folder))
    decoder.check_tokenizer(Letters())
    decoder.check_policy(policy)
    with pytest.raises(InputError, match=r"of another tokenizer"):
        decoder.check_tokenizer(Other())
    with pytest.raises(InputError, match=r"of another model"):
        decoder.check_policy(ToyPolicy(random_table(LENGTH, PROMPT, seed=1), VALUES))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lam": 1.5}, r"sampling.decoder.lam must lie in \[0, 1\], got 1.5"),
        ({"lam": -0.1}, r"sampling.decoder.lam must lie in \[0, 1\], got -0.1"),
        ({"lam": math.nan}, r"sampling.decoder.lam must lie in \[0, 1\], got nan"),
        ({"temperature": 0.0}, "sampling.decoder.temperature must be > 0"),
        ({"k": 0}, r"sampling.decoder.k must lie in \[1, 28\]"),
        ({"k": 29}, r"sampling.decoder.k must lie in \[1, 28\], the size of the datastore .*, got 29"),
        ({"search": "fais"}, "sampling.decoder.search must be"),
        ({"datastore": "nowhere"}, "'nowhere' holds no datastore"),
        ({"lambda": 0.5}, "did you mean 'lam'"),
    ],
)
def test_bad_settings_are_refused_by_name(folder, settings, said):
    with pytest.raises(InputError, match=said):
        SamplingConfig(decoder=spec(folder, **settings))


def test_the_temperature_is_the_keys_own_distance_where_none_is_given(policy, folder, tmp_path):
    decoder = make_decoder(spec(folder, temperature=None))
    keys, _ = memory()
    others = torch.cdist(keys, keys).fill_diagonal_(torch.inf).amin(1).square()
    assert decoder.scale == pytest.approx(float(others.mean()), rel=1e-5)
    same = DatastoreInfo.of("toy", policy.backbone, Letters(), hidden_size=4)
    with filled_datastore(tmp_path / "same", same) as add:
        add(keys[:1].expand(3, -1), torch.tensor([0, 1, 2]))
    with pytest.raises(InputError, match=r"sampling.decoder.temperature is missing: all keys .* are the same"):
        make_decoder(spec(str(tmp_path / "same"), k=2, temperature=None))
    make_decoder(spec(str(tmp_path / "same"), k=2, temperature=1.0))


def test_neighbours_alone_do_not_go_with_a_least_length(folder):
    with pytest.raises(InputError, match=r"lam 1 does not go with sampling.min_new_tokens"):
        SamplingConfig(decoder=spec(folder, lam=1.0), min_new_tokens=2)
    SamplingConfig(decoder=spec(folder, lam=0.9), min_new_tokens=2)
