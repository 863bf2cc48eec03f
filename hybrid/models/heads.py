"""What sits on the trunk beside the LM head."""

import torch
from torch import Tensor, nn

__all__ = ["RewardHead", "ValueHead"]


class ValueHead(nn.Module):
    """One linear map from a hidden state to the expected return. Starts at zero: every value is 0 at first.

    Computes in float32 whatever the trunk is in.   dropout: acts in train mode; the trainer's PPO stays in eval
    mode, because it compares values and log-probs.
    """

    def __init__(self, hidden_size: int, *, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T) float32 (float64 in a float64 head)."""
        weight = self.linear.weight
        with torch.autocast(hidden.device.type, enabled=False):
            value: Tensor = self.linear(self.dropout(hidden.to(weight.dtype)))
            return value.squeeze(-1)


class RewardHead(nn.Module):
    """One linear map without bias from a hidden state to a score. Its weights start as draws from N(0, 1 / (D + 1)).

    Computes in float32 whatever the trunk is in. Source: Stiennon et al. 2020 (arXiv:2009.01325).
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, hidden_size, 1, bias=False)
        nn.init.normal_(self.linear.weight, std=(hidden_size + 1) ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (...) float32 (float64 in a float64 head)."""
        weight = self.linear.weight
        with torch.autocast(hidden.device.type, enabled=False):
            score: Tensor = self.linear(hidden.to(weight.dtype))
            return score.squeeze(-1)
