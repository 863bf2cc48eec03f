"""Strategies that mix supervised and PPO steps on one policy: which step comes next, with which factors."""

from hybrid.mixing.blend import Blend, Single
from hybrid.mixing.gate import Gate
from hybrid.mixing.hint import Hint
from hybrid.mixing.joint import Joint, Ptx
from hybrid.mixing.order import Alternate, Sequential
from hybrid.mixing.prefix_rft import PrefixRFT
from hybrid.mixing.strategy import (
    Kind,
    Plan,
    Strategy,
    make_strategy,
    passes,
    register_strategy,
    strategy_names,
)

__all__ = [
    "Alternate",
    "Blend",
    "Gate",
    "Hint",
    "Joint",
    "Kind",
    "Plan",
    "PrefixRFT",
    "Ptx",
    "Sequential",
    "Single",
    "Strategy",
    "make_strategy",
    "passes",
    "register_strategy",
    "strategy_names",
]
