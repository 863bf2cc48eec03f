"""What sits on the trunk beside the LM head."""

import torch
from torch import Tensor, nn

__all__ = ["ValueHead"]


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
