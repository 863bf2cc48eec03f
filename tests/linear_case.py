"""Inputs of `linear_logprob` that several tests share."""

import importlib
import math

import torch

from hybrid.functional import entropy, full_kl, linear_logprob, token_logprob

# The function hides its module of the same name.
MODULE = importlib.import_module("hybrid.functional.linear_logprob")

# float64, vocabularies of a few thousand at most: rounding stays far below this.
TIGHT = 1e-10
# float32, statistics up to about 10: 10 * 6e-8 for a few roundings.
SINGLE = {"rtol": 1e-6, "atol": 2e-6}
IGNORE = -100
INF = math.inf
NAMES = ["logprob", "entropy", "kl"]
WANTS = [("logprob",), ("entropy",), ("kl",), ("kl", "logprob", "entropy")]


class Case:
    """Inputs with leading shape `shape`; the reference is of another width."""

    def __init__(self, shape=(2, 3), vocab=7, bias=True, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = normal(*shape, 4), normal(vocab, 4)
        self.ref_hidden, self.ref_weight = normal(*shape, 5), normal(vocab, 5)
        self.bias, self.ref_bias = (normal(vocab), normal(vocab)) if bias else (None, None)
        self.labels = torch.randint(vocab, shape, generator=generator)

    def trainable(self):
        """The inputs that get a gradient, as leaves that ask for one."""
        names = ["hidden", "weight"] + ["bias"] * (self.bias is not None)
        for name in names:
            setattr(self, name, getattr(self, name).clone().requires_grad_())
        return [getattr(self, name) for name in names]

    def stats(self, want=tuple(NAMES), **changes):
        arguments = {"bias": self.bias, "want": want}
        if "kl" in want:
            arguments |= {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight, "ref_bias": self.ref_bias}
        return linear_logprob(self.hidden, self.weight, self.labels, **(arguments | changes))

    def logits(self, ref=False):
        hidden, weight, bias = (
            (self.ref_hidden, self.ref_weight, self.ref_bias) if ref else (self.hidden, self.weight, self.bias)
        )
        return hidden @ weight.T + (0 if bias is None else bias)

    def by_definition(self, temperature=1.0, softcap=None):
        options = {"temperature": temperature, "softcap": softcap}
        return {
            "logprob": token_logprob(self.logits(), self.labels, **options),
            "entropy": entropy(self.logits(), **options),
            "kl": full_kl(self.logits(), self.logits(ref=True), **options),
        }

    def double(self):
        """The same numbers in float64."""
        twin = Case.__new__(Case)
        for name, x in vars(self).items():
            setattr(twin, name, x.detach().double() if x is not None and x.is_floating_point() else x)
        return twin
