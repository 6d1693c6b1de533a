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

PLACE = "cube_m"  # the column of a sample's extras: x, y, z in metres
COORDINATES = 3


class PlaceQuestion(nn.Module):
    """Two guesses of a place, in deviations from its mean over the data. places: (N, 3) of all observations."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: PolicyConfig, prompt: Prompt, views: int, places: Tensor) -> None:
        super().__init__()
        values = config.decoder.kv_heads * config.decoder.head_dim
        tokens = views * config.vision.tokens_per_view
        self.image = slice(prompt.image_start, prompt.image_start + tokens)
        self.early = nn.Linear(tokens * values, COORDINATES)
        self.late = nn.Linear(values, COORDINATES)
        self.register_buffer("mean", places.mean(0), persistent=False)
        self.register_buffer("deviation", places.std(0) + 1e-6, persistent=False)

    def forward(self, cache: Cache) -> tuple[Tensor, Tensor]:
        """From the cache of a prefix: (early, late), each (B, 3)."""
        early = cache[0].values[:, :, self.image].flatten(1)
        late = cache[-1].values[:, :, -1].flatten(1)
        return self.early(early), self.late(late)

    def error(self, cache: Cache, place_m: Tensor) -> Tensor:
        """Squared deviations of both guesses from places (B, 3), their mean for each observation: (B,)."""
        place = (place_m - self.mean) / self.deviation
        return torch.stack([(guess - place).square().mean(1) for guess in self(cache)]).mean(0)
