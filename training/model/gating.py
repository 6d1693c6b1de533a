"""Manifold-Preserving Gating: lift action features to the understanding stream, correct them, weigh the correction by a
sliced Wasserstein distance to an anchor, and bring them back.

Source: arXiv 2601.12993, eq. 13-16 and 21; where the published code differs, the published code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onbeat.training.config import DecoderConfig

# C chunk rows, E width of the action stream, H width of the understanding stream, M directions; leading axes are free.

NORM_EPSILON = 1e-5


class Gated(NamedTuple):
    """features (..., C, E); cost and gate (...), one of each per chunk."""

    features: Tensor
    cost: Tensor
    gate: Tensor


class ManifoldGate(nn.Module):
    """The gate's five linear maps."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        understanding, action = config.und.width, config.gen.width
        self.action_to_vlm_proj = nn.Linear(action, understanding)
        self.vlm_to_action_proj = nn.Linear(understanding, action)
        self.obs_proj = nn.Linear(understanding, understanding)
        self.action_proj = nn.Linear(action, understanding)
        self.enhancement_proj = nn.Linear(understanding, understanding)

    def anchor(self, clean: Tensor) -> Tensor:
        """Encoded clean actions (..., C, E) to the point (..., H) that every row is compared with."""
        return _normalise(self.action_proj(clean)).mean(dim=-2)

    def project(self, features: Tensor) -> Tensor:
        """Through both projections with no correction: the first pass of checkpoints trained that way."""
        return self.vlm_to_action_proj(self.action_to_vlm_proj(features))

    def forward(
        self,
        features: Tensor,
        anchor: Tensor,
        directions: Tensor | None = None,
        *,
        strength: float,
        temperature: float,
        stop_gradient: bool = True,
    ) -> Gated:
        """Correct features (..., C, E) towards the anchor (..., H).

        directions: raw, (M, H), any length; None takes the exact expectation over directions.
        """
        lifted = F.pad(self.action_to_vlm_proj(features), (0, 0, 1, 0))  # the state's row, zeros as published
        observed = self.obs_proj(lifted)
        cost = transport_cost(observed, anchor, directions)
        gate = torch.exp(-cost / temperature)
        gate = gate.detach() if stop_gradient else gate
        corrected = lifted + strength * self.enhancement_proj(observed * gate[..., None, None])
        return Gated(self.vlm_to_action_proj(corrected[..., 1:, :]), cost, gate)


def transport_cost(observed: Tensor, anchor: Tensor, directions: Tensor | None) -> Tensor:
    """Squared sliced Wasserstein-2 distance of the rows (..., C + 1, H) to copies of the anchor (..., H): (...).

    All anchor rows are equal, so no sorting. Averaged over random directions it is the squared length / H.
    """
    apart = _normalise(observed) - anchor.unsqueeze(-2)
    if directions is None:
        return apart.square().mean(dim=(-2, -1))
    return (apart @ F.normalize(directions, dim=-1).T).square().mean(dim=(-2, -1))


def _normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON)
