"""Pairs, and options that use all that a kind of loss can be given, for the tests of preferences."""

import math
from typing import get_args

import torch

from hybrid.functional import PreferenceKind

# float64, at most a dozen terms of size about 100: rounding stays far below this.
TIGHT = 1e-10
KINDS = get_args(PreferenceKind)
SMOOTHED = {"sigmoid": 0.1, "robust": 0.2, "exo": 1e-3, "simpo": 0.1}
BETA = 0.3
LABEL = torch.tensor([True, False, True, True, False, True, False])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def options(kind, **changes):
    """What the kind can be given, all of it in use."""
    given = {"kind": kind, "beta": BETA}
    if kind in SMOOTHED:
        given["label_smoothing"] = SMOOTHED[kind]
    if kind in ("sigmoid", "simpo"):
        given["margin"] = 0.7
    return given | changes


def pairs(size=7, seed=0, dtype=torch.float64):
    """chosen, rejected and the reference's: log-probs below 0."""
    generator = torch.Generator().manual_seed(seed)
    return [-5 * torch.rand(size, generator=generator, dtype=torch.float64).to(dtype) - 0.1 for _ in range(4)]
