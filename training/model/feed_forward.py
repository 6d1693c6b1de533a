"""The gated feed-forward of both streams, and the activations a checkpoint may name."""

import torch.nn.functional as F
from torch import Tensor, nn

from onbeat.training.config import StreamConfig

ACTIVATION = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class GatedFeedForward(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, stream: StreamConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(stream.width, stream.ffn_width, bias=False)
        self.up_proj = nn.Linear(stream.width, stream.ffn_width, bias=False)
        self.down_proj = nn.Linear(stream.ffn_width, stream.width, bias=False)
        self.activation = ACTIVATION[stream.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
