"""What travels between the rooms: examples, batches and rollouts, as frozen dataclasses.

Shape letters: `B` sequences, `P` prompt tokens, `T` response tokens (in a `Rollout`) or all tokens
(in a `Batch`), `R` references.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hybrid.core.rows import extents, handed_on, moved, used_columns

__all__ = ["IGNORE", "Batch", "Encoded", "Example", "Rollout"]

IGNORE = -100  # the label of a token that is not trained; transformers' and torch's convention


@dataclass(frozen=True)
class Example:
    """One row of the user's data, as text, or as the tokens that the user made of it.

    prompt: what the model is given, before any template.   target: the answer wanted, "" where there is none.
    messages: a dialogue of {"role", "content"}, for chat data, with whatever other keys its turns have; then `target`
        is its last assistant turn. A content may be None or absent beside `tool_calls`.
    num_prompt_messages: the first so many messages are a prompt: the assistant's turns among them are not trained.
    tools: JSON schemas of the tools, for the chat template.
    input_ids, labels: a tokenised row, of one length; labels are the ids, IGNORE where a token is not trained.
    item: the row itself, which rewards receive.
    rejected: the same prompt with an answer that was liked less than the target, or that was called bad; or None.
        Where that is all that is known of the prompt, the target is "": a bad answer is never imitated.
    margin: how much better the target was found, 0 where that is not known.   weight: of the pair among others.
    A row of plain text has `prompt == ""` and the whole text as its target; a tokenised row has neither.
    """

    prompt: str
    target: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    item: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    num_prompt_messages: int = 0
    input_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    rejected: "Example | None" = None
    margin: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    input_ids: prompt, target and EOS.   labels: the same length; IGNORE where a token is not trained.
    prompt_ids: what a rollout is started with.
    num_hint: the last so many of prompt_ids are the beginning of the target, which rewards read with the response.
    num_shots: the first so many of prompt_ids, and of input_ids, are other prompts with answers, which a memory has put
        there: the policy sees them, and rewards do not.
    prompt, target: the texts that rewards are given beside the response (for plain text, the row cut in two).
    item: the row it came from.
    rejected, margin, weight: see `Example`; the rejected one has the same prompt_ids.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    prompt: str
    target: str
    item: Mapping[str, Any]
    num_hint: int = 0
    num_shots: int = 0
    rejected: "Encoded | None" = None
    margin: float = 0.0
    weight: float = 1.0

    @property
    def has_target(self) -> bool:
        """Whether a supervised step can learn anything from it: nothing predicts the first token."""
        return any(label != IGNORE for label in self.labels[1:])

    @property
    def is_pair(self) -> bool:
        """Whether it has two answers, of which one was preferred."""
        return self.has_target and self.rejected is not None and self.rejected.has_target


@dataclass(frozen=True)
class Batch:
    """Examples on the device: what `sft_step` trains on and what `rollout` takes its prompts from.

    input_ids, labels: (B, T) int64, right-padded; labels[b, t] is the token at t itself (no shift), or IGNORE.
    attention_mask: (B, T) bool, or (B, T) int64 segment numbers 1, 2, … (0 = padding) where `position_ids`
        is given: packed rows, in which a token sees only its own segment.
    position_ids: (B, T) int64, or None where every row is one sequence.
    examples: the examples in it, in order (more than B of them where rows are packed).
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    examples: tuple[Encoded, ...] = ()
    position_ids: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> "Batch":
        """Some rows, for accumulation. `examples` are left out: they belong to the whole."""
        position_ids = None if self.position_ids is None else self.position_ids[rows]
        part = Batch(self.input_ids[rows], self.attention_mask[rows], self.labels[rows], (), position_ids)
        return handed_on(self, part, rows)

    @cached_property
    def extents(self) -> Tensor:
        """See `extents`: of the tokens and those that are trained. Read from the device once, for all rows together."""
        return extents(self.attention_mask, self.labels[:, 1:] != IGNORE)

    def trimmed(self) -> "Batch":
        """Without the padding behind the longest row."""
        end = int(self.extents[1].max()) if len(self) else 0
        if end == self.input_ids.shape[1]:
            return self
        names = ("input_ids", "attention_mask", "labels", "position_ids")
        cut: dict[str, Any] = {name: x[:, :end] for name in names if (x := getattr(self, name)) is not None}
        return handed_on(self, replace(self, **cut), slice(None))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        return moved(self, device)

    @property
    def num_tokens(self) -> int:
        """Tokens that are trained: the divisor of the loss. The first token of a row predicts nothing before it."""
        return int(self.extents[2].sum())

    @property
    def mean_over(self) -> float:
        return self.num_tokens


@dataclass(frozen=True)
class Rollout:
    """What the policy answered, and all that PPO needs to learn from it. No tensor has a gradient.

    input_ids: (B, P+T) int64, prompts left-padded, responses right-padded.   attention_mask: (B, P+T) bool.
    mask: (B, T) bool, the response's own tokens, up to and including the EOS, or the token that completes a stop
        string.
    old_logprob, old_value, kl, reward: (B, T) float32, 0 outside the mask; `[:, t]` belongs to response token t.
        old_value is the value before token t is sampled. kl is against the references, weighted and summed.
        reward is what GAE receives: the shaped score and, where it belongs there, the KL penalty.
    ref_logprob: (R, B, T) float32, one for each reference.   ref_weight: the factor of each one's KL.
    entropy: (B, T) float32, of the policy's distribution, nats.
    score: (B,) float32, the reward function's word on each response (the sum, where it spoke per token).
    ended: (B,) bool, whether one of these came.
    temperature: what the logits were divided by when it was sampled; the update divides by the same.
    group: (B,) int64, equal where the rows answer the same prompt; from `collect` the example's number. Or None.
    sampling_logprob: (B, T) float32, of each token under the distribution that it was drawn from (after top_k, top_p
        and min_new_tokens, by the engine that drew it), 0 outside the mask; None where that is not known.
    decoder: what found the responses (`sampling.decoder`); only of some the log-probs are those of a policy.
    window: the tokens before each that its log-probs, old and of the references, were taken from; None: all.
    prompts, responses, targets: the texts, B of each, or none; a response stands behind its hint.
    examples: what was answered, B, or none.
    components: raw score by reward name, B each.
    reward_metrics: what the reward logs of each component.   seconds: what it took, by part.
    advantage, return_: (B, T) float32, or None until `with_advantages` has put them there; without a critic
        return_ stays None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    old_logprob: Tensor
    old_value: Tensor
    ref_logprob: Tensor
    kl: Tensor
    reward: Tensor
    entropy: Tensor
    score: Tensor
    ended: Tensor
    ref_weight: tuple[float, ...] = ()
    temperature: float = 1.0
    group: Tensor | None = None
    sampling_logprob: Tensor | None = None
    decoder: str = "sample"
    window: int | None = None
    prompts: tuple[str, ...] = ()
    responses: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    examples: tuple[Encoded, ...] = ()
    components: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    reward_metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    advantage: Tensor | None = None
    return_: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> "Rollout":
        """Some rows, for a minibatch. The texts are left out: they belong to the whole."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        picked: dict[str, Any] = {
            name: x[:, rows] if name == "ref_logprob" else x[rows]
            for name, x in tensors.items()
            if isinstance(x, Tensor)
        }
        empty: dict[str, Any] = dict.fromkeys(("prompts", "responses", "targets", "examples"), ())
        part = replace(self, **picked, **empty, components={}, reward_metrics={})
        return handed_on(self, part, rows)

    @cached_property
    def extents(self) -> Tensor:
        """See `extents`: of the tokens and of `mask`. Read from the device once, for all rows together."""
        return extents(self.attention_mask, self.mask)

    def trimmed(self) -> "Rollout":
        """Without the padding before the longest prompt and behind the longest response."""
        total, length = self.input_ids.shape[1], self.mask.shape[1]
        start, end = used_columns(self.extents, self.prompt_length)
        if (start, end) == (0, total):
            return self
        cut: dict[str, Any] = {name: getattr(self, name)[:, start:end] for name in ("input_ids", "attention_mask")}
        for f in fields(self):
            x = getattr(self, f.name)
            if isinstance(x, Tensor) and f.name not in cut and x.shape[-1:] == (length,) and x.dim() > 1:
                cut[f.name] = x[..., : length - (total - end)]
        part = replace(self, **cut)
        vars(part)["extents"] = self.extents - torch.tensor([[start], [start], [0]])
        return part

    @property
    def num_tokens(self) -> int:
        """Valid response tokens."""
        return int(self.extents[2].sum())

    @property
    def mean_over(self) -> float:
        return self.num_tokens

    @property
    def prompt_length(self) -> int:
        """P, the padded length of the prompts."""
        return self.input_ids.shape[1] - self.mask.shape[1]

    def to(self, device: torch.device | str) -> "Rollout":
        """The same rollout with every tensor on `device`."""
        return moved(self, device)
