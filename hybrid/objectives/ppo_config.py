"""The settings of a PPO step: which advantage, which surrogate, how many passes."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from hybrid.functional import Aggregation, ImportanceLevel, ImportanceMode, RatioLevel, Surrogate

__all__ = ["Advantage", "PPOConfig"]

Advantage = Literal["gae", "group", "group_mean", "leave_one_out", "reinforce++"]
CHOICES = {
    "advantage": Advantage,
    "surrogate": Surrogate,
    "ratio": RatioLevel,
    "aggregation": Aggregation,
    "importance_mode": ImportanceMode,
}


@dataclass(frozen=True)
class PPOConfig:
    """PPO steps: one rollout, then several passes over it.

    advantage: what a token's loss is weighted with.
        gae             against the value head, by gamma and lam
        group           GRPO: the response's reward against those of its prompt's others, over their deviation
        group_mean      Dr. GRPO: the same, not divided; with whiten_advantage the baseline of REINFORCE++
        leave_one_out   RLOO: the response's reward against the mean of its prompt's OTHER responses
        reinforce++     the token's rewards to come, by gamma (arXiv:2501.03262)
    The response's reward is the sum of its tokens' rewards: the shaped score and, where it is in the reward, the KL
    penalty. All but gae have no critic: the value head is not trained, and lam and value_* are not read.
    A2C is epochs = 1, minibatch_size = all responses, clip = None. CISPO's authors leave out the lower bound: clip = 1,
    with the upper one in clip_high.
    GSPO is ratio = sequence with a group's advantage and aggregation = sequence_mean; its ratios stay close to 1, and
    its authors clip at 3e-4 and 4e-4. DAPO is advantage = group with clip_high and resample.
    """

    batch_size: int = 64  # prompts of one rollout
    samples_per_prompt: int = 1  # responses to each of them
    # More rollouts of a step, at most, in place of prompts whose responses all score alike; 0: those stay.
    resample: int = 0
    minibatch_size: int = 16  # responses of one optimizer step
    microbatch_size: int | None = None  # rows of one forward and backward; None: the minibatch
    epochs: int = 4  # passes over one rollout
    lr_factor: float = 1.0  # on the optimizer's learning rate; beside other objectives their mean, weighted by coef
    advantage: Advantage = "gae"
    surrogate: Surrogate = "ppo"  # cispo: the ratio is clipped as a weight, and no token loses its gradient
    ratio: RatioLevel = "token"  # sequence: GSPO, the geometric mean of a response's ratios at all its tokens
    clip: float | None = 0.2  # ratio kept in [1 - clip, 1 + clip]; None: not clipped
    clip_high: float | None = None  # another upper range: [1 - clip, 1 + clip_high]
    dual_clip: float | None = None  # c > 1: a negative advantage costs at most c times itself
    # Weigh by old over sampling probability, of each token or sequence. None: with rollout.engine vllm and with a
    # rollout.staleness token, else nothing.
    importance: ImportanceLevel | None = None
    importance_mode: ImportanceMode = "truncate"  # a weight above the cap is cut to it; mask: outside 1/cap..cap is 0
    importance_cap: float = 2.0
    aggregation: Aggregation = "token_mean"  # how the token losses of the rows are averaged
    fixed_length: int | None = None  # tokens that aggregation "fixed_length" divides each row by
    value_clip: float | None = 0.2  # value kept within this distance of its old value; None: not clipped
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantage: bool | None = None  # over the rollout's tokens; None: for gae and reinforce++
    whiten_reward: bool = False  # unit variance, the mean kept; for gae and reinforce++
    target_kl: float | None = None  # nats per token (approx_kl); stop the passes beyond it

    @property
    def num_responses(self) -> int:
        """Responses of one rollout."""
        return self.batch_size * self.samples_per_prompt

    @property
    def num_updates(self) -> int:
        """Optimizer steps that one rollout gives, where no early stop shortens it."""
        return self.epochs * math.ceil(self.num_responses / self.minibatch_size)

    @property
    def has_critic(self) -> bool:
        """Whether the value head takes part."""
        return self.advantage == "gae"

    @property
    def is_per_token(self) -> bool:
        """Whether the tokens of one response have advantages of their own."""
        return self.advantage in ("gae", "reinforce++")

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_choices()
        self._check_clipping()
        for name in ("value_clip", "target_kl"):
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise ValueError(f"PPOConfig.{name} must be > 0, got {number}")
        for name in ("lr_factor", "value_coef", "entropy_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"PPOConfig.{name} must be >= 0 and finite, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"PPOConfig.{name} must lie in [0, 1], got {getattr(self, name)}")

    def _check_sizes(self) -> None:
        for name in ("batch_size", "samples_per_prompt", "minibatch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"PPOConfig.{name} must be >= 1, got {getattr(self, name)}")
        if self.minibatch_size > self.num_responses:
            raise ValueError(
                f"PPOConfig.minibatch_size must be at most batch_size = {self.batch_size} times samples_per_prompt = "
                f"{self.samples_per_prompt}, got {self.minibatch_size}"
            )
        if self.microbatch_size is not None and not 1 <= self.microbatch_size <= self.minibatch_size:
            raise ValueError(
                f"PPOConfig.microbatch_size must lie in [1, minibatch_size = {self.minibatch_size}], "
                f"got {self.microbatch_size}"
            )
        if (self.aggregation == "fixed_length") != (self.fixed_length is not None):
            raise ValueError(
                f"PPOConfig.fixed_length goes with aggregation 'fixed_length' and only with it, got "
                f"{self.fixed_length} with {self.aggregation!r}"
            )

    def _check_choices(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise ValueError(f"PPOConfig.{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.importance is not None and self.importance not in get_args(ImportanceLevel):
            raise ValueError(f"PPOConfig.importance must be token, sequence or None, got {self.importance!r}")
        if not self.importance_cap >= 1:
            raise ValueError(f"PPOConfig.importance_cap must be >= 1, got {self.importance_cap}")
        if not self.is_per_token and self.samples_per_prompt < 2:
            raise ValueError(
                f"PPOConfig.samples_per_prompt must be >= 2 with advantage {self.advantage!r}, which compares the "
                f"responses to one prompt, got {self.samples_per_prompt}"
            )
        if self.resample < 0:
            raise ValueError(f"PPOConfig.resample must be >= 0, got {self.resample}")
        if self.resample and self.is_per_token:
            raise ValueError(
                f"PPOConfig.resample replaces groups in which no response is better than another, and advantage "
                f"{self.advantage!r} compares none: take group, group_mean or leave_one_out, or set it to 0"
            )
        if not self.is_per_token and self.whiten_reward:
            raise ValueError(
                f"PPOConfig.whiten_reward goes with advantage 'gae' or 'reinforce++', got {self.advantage!r}; "
                f"score.scale scales the scores"
            )

    def _check_clipping(self) -> None:
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ValueError(f"PPOConfig.clip must lie in (0, 1], or be None for no clipping, got {self.clip}")
        if self.clip_high is not None and not (self.clip is not None and self.clip_high > 0):
            raise ValueError(f"PPOConfig.clip_high must be > 0 and goes with a clip, got {self.clip_high}")
        if self.dual_clip is None:
            return
        if not self.dual_clip > 1:
            raise ValueError(f"PPOConfig.dual_clip must be > 1, got {self.dual_clip}")
        if self.clip is None or self.surrogate != "ppo":
            raise ValueError(
                f"PPOConfig.dual_clip goes with a clip and surrogate 'ppo', got clip {self.clip} and {self.surrogate!r}"
            )
