"""A second question in training only: where is the object? It teaches the network to see long before actions alone do.

The answer is read from the cache that the actions read, by linear maps that the checkpoint does not keep: from the
image tokens' first values (a short way for the gradient into the vision tower), and from the last prefix token's values
in the last layer (what every action row can look at). docs/decisions/0011-first-policy.md has what it brings.
"""

import torch
from torch import Tensor, nn

from onbeat.runtime.prompt import Prompt
from onbeat.training.config import PolicyConfig
from onbeat.training.model.policy import Cache

PLACE = 3  # x, y, z


class PlaceHeads(nn.Module):
    """Two guesses of a place, each (B, 3), in deviations from its mean over the data."""

    def __init__(self, config: PolicyConfig, prompt: Prompt, views: int) -> None:
        super().__init__()
        values = config.decoder.kv_heads * config.decoder.head_dim
        tokens = views * config.vision.tokens_per_view
        self.image = slice(prompt.image_start, prompt.image_start + tokens)
        self.early = nn.Linear(tokens * values, PLACE)
        self.late = nn.Linear(values, PLACE)

    def forward(self, cache: Cache) -> tuple[Tensor, Tensor]:
        """From the cache of a prefix: (early, late)."""
        early = cache[0].values[:, :, self.image].flatten(1)
        late = cache[-1].values[:, :, -1].flatten(1)
        return self.early(early), self.late(late)


def place_loss(guesses: tuple[Tensor, Tensor], place: Tensor) -> Tensor:
    """Mean squared error of both guesses, in squared deviations. place: (B, 3) in the same terms."""
    return torch.stack([(guess - place).square().mean() for guess in guesses]).mean()
