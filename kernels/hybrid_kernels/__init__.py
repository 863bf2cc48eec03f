"""Triton twins of `hybrid.functional`, same names, arguments and results. Imports torch and triton only."""

from hybrid_kernels.gae import gae
from hybrid_kernels.launch import TokenStats
from hybrid_kernels.linear_logprob import linear_logprob
from hybrid_kernels.linear_loss import linear_logprob_loss
from hybrid_kernels.logprob import token_stats

__all__ = ["TokenStats", "gae", "linear_logprob", "linear_logprob_loss", "token_stats"]
