"""The heads of the action stream: state in, noisy actions in, velocity out."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# E width of the action stream, A = 200 unified slots.

UNIFIED = 200
LONGEST_PERIOD = 1e4


class TwoLayers(nn.Module):
    """Linear, ReLU, linear: the state encoder and the action decoder."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(inputs, hidden)
        self.layer2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(F.relu(self.layer1(x)))


def embed_time(bucket: Tensor, width: int) -> Tensor:
    """Integer time buckets (...) to [sin(t f), cos(t f)] (..., width), f_i = exp(-i ln(1e4) / half)."""
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=bucket.device) * (-math.log(LONGEST_PERIOD) / half)
    )
    phase = bucket.float().unsqueeze(-1) * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


class ActionEncoder(nn.Module):
    """Noisy actions and their flow time to tokens of the action stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.W1 = nn.Linear(UNIFIED, width)
        self.W2 = nn.Linear(2 * width, width)
        self.W3 = nn.Linear(width, width)

    def forward(self, actions: Tensor, bucket: Tensor) -> Tensor:
        """actions (..., A), time buckets (...) to features (..., E)."""
        linear = self.W1(actions)
        timed = torch.cat([linear, embed_time(bucket, linear.shape[-1])], dim=-1)
        return self.W3(F.silu(self.W2(timed)))
