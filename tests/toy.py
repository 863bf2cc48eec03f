"""A policy over a handful of tokens whose every response can be enumerated, with the face of a `Policy`."""

import itertools

import torch
from torch import nn

from hybrid.core import Encoded
from hybrid.rollout import Asked, RolloutConfig, SamplingConfig, TorchEngine

PAD, EOS = 0, 2


class ToyBackbone(nn.Module):
    """Log-probs and values by the tokens so far: a row of a table, as a hidden state (V + 1) that a fixed head reads.

    table: tokens so far, a tuple, prompt included -> log-probs (V,).   values: the same -> a number; None: 0.
    """

    context_length, softcap, is_compiled, keep_bytes, logit_scale = None, None, False, 0, 1.0

    def __init__(self, table, values=None, vocab=3):
        super().__init__()
        self.vocab, self.rows = vocab, {key: i + 1 for i, key in enumerate(table)}
        # What is never asked about is a hidden state of zeros.
        states = [torch.zeros(vocab + 1)]
        states += [torch.cat([row, torch.tensor([float((values or {}).get(key, 0))])]) for key, row in table.items()]
        longest = max(map(len, table))
        codes = torch.zeros((vocab + 1) ** longest, dtype=torch.long)
        for key, row in self.rows.items():
            codes[self._code(key)] = row
        self.register_buffer("states", torch.stack(states))
        self.register_buffer("codes", codes)
        self.head_weight = nn.Parameter(torch.eye(vocab, vocab + 1))
        self.head_bias = None

    def _code(self, key):
        code = 0
        for token in key:
            code = code * (self.vocab + 1) + token + 1
        return code

    @property
    def device(self):
        return self.states.device

    def eos_ids(self, tokenizer):
        return [EOS]

    def fit_vocabulary(self, tokenizer):
        pass

    def logits(self, hidden):
        return hidden @ self.head_weight.T

    def forward(self, input_ids, attention_mask, position_ids=None):
        code, states = torch.zeros(len(input_ids), dtype=torch.long), []
        for ids, mask in zip(input_ids.T, attention_mask.bool().T, strict=True):
            code = torch.where(mask, code * (self.vocab + 1) + ids + 1, code)
            states.append(self.states[self.codes[code.clamp(max=len(self.codes) - 1)]])
        return torch.stack(states, 1)

    @property
    def trunk(self):
        return self

    def next_hidden(self, input_ids, attention_mask, cache=None, position_ids=None):
        ids = input_ids if cache is None else torch.cat([cache, input_ids], 1)
        return self(ids, attention_mask[:, : ids.shape[1]])[:, -1], ids

    def next_logits(self, *given, **options):
        hidden, cache = self.next_hidden(*given, **options)
        return self.logits(hidden), cache


class ToyPolicy(nn.Module):
    def __init__(self, table, values=None, vocab=3):
        super().__init__()
        self.backbone = ToyBackbone(table, values, vocab)

    @property
    def device(self):
        return self.backbone.device

    def value_head(self, hidden):
        return hidden[..., -1]


def sequences(length, vocab=3, eos=EOS):
    """Every response of at most `length` tokens: ended by EOS, or cut off."""
    others = [token for token in range(vocab) if token != eos]
    ended = [(*head, eos) for n in range(length) for head in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=length))


def random_table(length, prompt, vocab=3, seed=0):
    """Log-probs behind every beginning of a response of at most `length` tokens."""
    generator, table = torch.Generator().manual_seed(seed), {}
    others = [token for token in range(vocab) if token != EOS]
    for n in range(length):
        for head in itertools.product(others, repeat=n):
            table[(*prompt, *head)] = torch.randn(vocab, generator=generator).mul(0.8).log_softmax(0)
    return table


def exact_logprob(table, prompt, response, temperature=1.0):
    """log p of a response, by the table."""
    total = 0.0
    for n, token in enumerate(response):
        row = (table[(*prompt, *response[:n])].double() / temperature).log_softmax(0)
        total += float(row[token])
    return total


class TableJudge:
    """Scores by a dict of responses, tuples; what is not in it has 0."""

    def __init__(self, scores, vocab=3):
        self.base = vocab + 1
        self.table = torch.zeros(self.base ** max(map(len, scores)), dtype=torch.float64)
        for response, score in scores.items():
            code = 0
            for token in response:
                code = code * self.base + token + 1
            self.table[code] = score

    def __call__(self, examples, rows):
        code = torch.zeros(len(rows), dtype=torch.long)
        for ids, mask in zip(rows.ids.T, rows.mask.T, strict=True):
            code = torch.where(mask, code * self.base + ids + 1, code)
        return self.table[code]


def toy_asked(policy, prompt, *, judge=None, repeats=1, seed=0, **sampling):
    """One prompt, put to a toy policy."""
    ids = torch.tensor([prompt])
    example = Encoded(tuple(prompt), (-100,) * len(prompt), tuple(prompt), "", "", {})
    engine = TorchEngine(policy, RolloutConfig(shadow=False, cuda_graphs=False))
    return Asked(
        engine, ids, torch.ones_like(ids, dtype=torch.bool), (example,),
        SamplingConfig(**sampling), eos_ids=(EOS,), pad_id=PAD, repeats=repeats,
        generator=torch.Generator().manual_seed(seed), judge=judge,
    )  # fmt: skip


def shares(responses, among):
    """How often each of these responses came, a tensor; every one that came must be among them."""
    distinct, counts = torch.where(responses.mask, responses.ids, -1).unique(dim=0, return_counts=True)
    found = {tuple(ids): int(n) for ids, n in zip(distinct.tolist(), counts, strict=True)}
    width = responses.ids.shape[1]
    known = [tuple(response) + (-1,) * (width - len(response)) for response in among]
    assert found.keys() <= set(known)
    return torch.tensor([found.get(key, 0) for key in known], dtype=torch.float64) / len(responses)


def total_variation(p, q):
    return float((p - q).abs().sum()) / 2
