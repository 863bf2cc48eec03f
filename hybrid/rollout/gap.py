"""Whether what was sampled is what is trained: the sampler's log-probs against the training forward's."""

import torch

from hybrid.core import Rollout, RunStopped
from hybrid.functional import masked_mean
from hybrid.models import Policy
from hybrid.rollout.sampling import SamplingConfig

__all__ = ["check_sampling_gap"]

# Nats per token, in the mean, that rounding may explain with a cache and without: float32's sums in another order are
# a thousand times smaller, half precision's move a log-prob by some hundredths. A single token may have 50 times it.
TOLERANCE, HALF_TOLERANCE, OF_ONE_TOKEN = 0.01, 0.1, 50


def check_sampling_gap(rollout: Rollout, policy: Policy, sampling: SamplingConfig) -> None:
    """Raise RunStopped where the tokens were not drawn from the distribution that is trained.

        gap = |sampling_logprob - old_logprob|

    top_k, top_p and min_new_tokens draw from less than the whole distribution, which makes each log-prob larger and
    is the user's wish: with them only a gap to the other side counts.
    """
    if rollout.sampling_logprob is None or not sampling.temperature:
        return
    gap = rollout.old_logprob - rollout.sampling_logprob
    gap = gap.clamp(min=0) if sampling.is_truncated else gap.abs()
    mean, largest = float(masked_mean(gap, rollout.mask)), float(gap.max())
    kind = policy.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else policy.backbone.head_weight.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    # Dividing the logits by a temperature below 1 divides their rounding too.
    tolerance = (HALF_TOLERANCE if half else TOLERANCE) / min(sampling.temperature, 1.0)
    # NaN is beyond any tolerance.
    if not (mean <= tolerance and largest <= OF_ONE_TOKEN * tolerance):
        raise RunStopped(
            f"the log-probs that the responses were drawn with differ from those of the training forward by {mean:.3g} "
            f"nats a token in the mean and {largest:.3g} at most (sampling_gap), more than {dtype} explains "
            f"({tolerance:.2g} in the mean): {type(policy.backbone.model).__name__} computes something else with its "
            "cache. PPO's ratios would be wrong; set ppo.importance=token or sequence to correct for it"
        )
