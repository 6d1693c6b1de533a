"""Colours changed a little in training, so that a policy does not hang on one camera's."""

from typing import NamedTuple

import torch
from torch import Tensor


class Colours(NamedTuple):
    """gain, offset: (B, V, 3, 1, 1), around 1, in deviations of normalised pixels."""

    gain: Tensor
    offset: Tensor

    def apply(self, pixels: Tensor) -> Tensor:
        """pixels: (B, V', 3, S, S), normalised; views past V have the colours of the first ones again."""
        view = torch.arange(pixels.shape[1]) % self.gain.shape[1]
        return pixels * self.gain[:, view] + (self.offset[:, view] - 1)

    def rows(self, rows: Tensor, device: torch.device) -> "Colours":
        """Those of some observations."""
        return Colours(self.gain[rows].to(device), self.offset[rows].to(device))


def draw_colours(batch: int, views: int, amount: float, generator: torch.Generator) -> Colours | None:
    """Gain and offset of each image's channels, changed by up to `amount`; None without any, and nothing is drawn."""
    if amount == 0:
        return None
    gain, offset = (1 + amount * (2 * torch.rand((batch, views, 3, 1, 1), generator=generator) - 1) for _ in range(2))
    return Colours(gain, offset)
