"""The connector: image tokens of the vision tower to vectors of the understanding stream."""

from torch import Tensor, nn

from onbeat.training.config import PolicyConfig

NORM_EPSILON = 1e-5


class Connector(nn.Module):
    """LayerNorm, linear, erf GELU, linear."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        wide, width = config.vision.width * config.vision.shuffle**2, config.decoder.und.width
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(wide, eps=NORM_EPSILON), nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, tokens, shuffle^2 x vision width) to (B, tokens, und width)."""
        return self.mlp1(tokens)
