"""Monte-Carlo tree search over tokens, by the value head."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hybrid.core import InputError
from hybrid.rollout.asked import Asked
from hybrid.rollout.decoder import Decoder, register_decoder
from hybrid.rollout.judging import By
from hybrid.rollout.responses import Responses

__all__ = ["PPOMCTS"]


@register_decoder("ppo_mcts")
@dataclass(frozen=True, kw_only=True)
class PPOMCTS(Decoder):
    """Before each token a tree of what may come is grown by `simulations`, and the token visited most is taken.

        select   argmax_a Q(s, a) + explore * p(a | s) * sqrt(sum_b N(s, b)) / (1 + N(s, a))
        expand   V(s') by the value head, the `branch` likeliest tokens; Q(s', a) begins as V(s')
        back up  N(s, a) + 1,  Q(s, a) <- V(s'),  V(s) <- sum_a N(s, a) Q(s, a) / sum_a N(s, a)

    The next token goes on with the tree that it has. A token costs `simulations` forwards over all before it.
    visits_temperature: 0 takes the token of most visits; else it is drawn, with probability N^(1 / temperature).
    ends_by, reward: as `value_guided` has them.
    Source: Liu et al. 2023 (arXiv:2309.15028), without a KL penalty in the tree.
    """

    simulations: int = 16
    branch: int = 8
    explore: float = 1.0
    visits_temperature: float = 0.0
    ends_by: By = "value"
    reward: Any = None

    def __post_init__(self) -> None:
        self._at_least(1, "simulations", "branch")
        self._positive("explore")
        if not 0 <= self.visits_temperature < math.inf:
            raise InputError(f"visits_temperature must be >= 0 and finite, got {self.visits_temperature}")
        self._reward_is_asked("ends_by", "leave one of them out")

    @property
    def needs_reward(self) -> bool:
        return self.ends_by == "reward"

    def answers(self, asked: Asked) -> Responses:
        prompts = asked.numbers(asked.repeats).tolist()
        roots = [_Node([], 0.0) for _ in prompts]
        self._look(asked, prompts, roots)
        asked.warn_of_zero(torch.tensor([root.value for root in roots]))
        while going := [row for row, root in enumerate(roots) if not root.is_whole]:
            for _ in range(self.simulations):
                paths = [self._selected(asked, roots[row]) for row in going]
                self._look(asked, [prompts[row] for row in going], [path[-1][0] for path in paths])
                for path in paths:
                    _back_up(path)
            chance = asked.uniform(len(going)).tolist()
            for row, uniform in zip(going, chance, strict=True):
                roots[row] = roots[row].children[self._taken(roots[row], uniform)]
        found = Responses.of_lists([root.ids for root in roots], asked.width, pad_id=asked.pad_id, device=asked.device)
        return replace(found, ended=torch.tensor([root.has_ended for root in roots], device=asked.device)).trimmed()

    def _selected(self, asked: Asked, root: "_Node") -> "list[tuple[_Node, int]]":
        """The nodes from the root to one that is new or whole, each with the place of the edge that leaves it."""
        node, path = root, []
        while not node.is_whole and not node.is_new:
            total = math.sqrt(sum(node.visits))
            worth = [
                q + self.explore * p * total / (1 + n)
                for q, p, n in zip(node.q, node.prior, node.visits, strict=True)
            ]  # fmt: skip
            # Before the first visit all bonuses are 0, and the likeliest comes first.
            place = max(range(len(worth)), key=worth.__getitem__)
            path.append((node, place))
            node = node.child(place, asked)
        return [*path, (node, -1)]

    def _look(self, asked: Asked, prompts: list[int], nodes: "list[_Node]") -> None:
        """Have the new ones among these nodes say what they are worth, and what may follow them."""
        growing = [(p, node) for p, node in zip(prompts, nodes, strict=True) if node.is_new and not node.is_whole]
        ended = [(p, node) for p, node in zip(prompts, nodes, strict=True) if node.is_new and node.is_whole]
        if growing:
            numbers, rows = _rows(asked, growing)
            logits, value = asked.states(numbers, rows)
            top, tokens = asked.next_logprob(logits, rows.lengths).topk(min(self.branch, logits.shape[1]), 1)
            for (_, node), v, log_p, ids in zip(growing, value.tolist(), top.tolist(), tokens.tolist(), strict=True):
                node.expand(v, [(token, math.exp(x)) for token, x in zip(ids, log_p, strict=True) if x > -math.inf])
        if ended and self.ends_by == "reward":
            numbers, rows = _rows(asked, ended)
            for (_, node), score in zip(ended, asked.score(numbers, rows).tolist(), strict=True):
                node.value = score
        for _, node in ended:
            node.is_new = False

    def _taken(self, root: "_Node", uniform: float) -> int:
        """The token that is taken, by the visits of the root's edges."""
        if not self.visits_temperature:
            return root.tokens[max(range(len(root.visits)), key=root.visits.__getitem__)]
        weights = [(n / max(root.visits)) ** (1 / self.visits_temperature) for n in root.visits]
        rest, visited = uniform * sum(weights), [i for i, n in enumerate(root.visits) if n]
        for place in visited:
            rest -= weights[place]
            if rest < 0:
                return root.tokens[place]
        return root.tokens[visited[-1]]


@dataclass
class _Node:
    """A beginning of a response, and the edges to those that are one token longer.

    value: of the beginning; of a whole response its reward, or the value before its last token.
    """

    ids: list[int]
    value: float
    has_ended: bool = False
    is_whole: bool = False
    is_new: bool = True
    tokens: list[int] = field(default_factory=list)
    prior: list[float] = field(default_factory=list)
    visits: list[int] = field(default_factory=list)
    q: list[float] = field(default_factory=list)
    children: "dict[int, _Node]" = field(default_factory=dict)

    def expand(self, value: float, likeliest: list[tuple[int, float]]) -> None:
        """Take a value, and edges to these tokens, with their probabilities."""
        self.value, self.is_new = value, False
        self.tokens, self.prior = [token for token, _ in likeliest], [p for _, p in likeliest]
        self.visits, self.q = [0] * len(likeliest), [value] * len(likeliest)

    def child(self, place: int, asked: Asked) -> "_Node":
        """What the edge leads to, made at the first visit."""
        token = self.tokens[place]
        if token not in self.children:
            ids = [*self.ids, token]
            ended = token in asked.eos_ids or (asked.is_over is not None and asked.is_over(ids))
            self.children[token] = _Node(ids, self.value, ended, ended or len(ids) == asked.width)
        return self.children[token]


def _back_up(path: list[tuple[_Node, int]]) -> None:
    """Tell the edges of a path, from its end, what its last node is worth."""
    worth = path[-1][0].value
    for node, place in reversed(path[:-1]):
        node.visits[place] += 1
        node.q[place] = worth
        worth = sum(n * q for n, q in zip(node.visits, node.q, strict=True)) / sum(node.visits)


def _rows(asked: Asked, nodes: list[tuple[int, _Node]]) -> tuple[torch.Tensor, Responses]:
    """The prompts' numbers and the beginnings, as `Asked` takes them."""
    rows = Responses.of_lists([node.ids for _, node in nodes], asked.width, pad_id=asked.pad_id, device=asked.device)
    rows = replace(rows, ended=torch.tensor([node.has_ended for _, node in nodes], device=asked.device))
    return torch.tensor([number for number, _ in nodes], device=asked.device), rows
