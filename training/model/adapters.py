"""Embodiment-specific adaptation: a bank of adapters, one per unified slot, on the layers where slots enter and leave.

The adapter of a slot is what its robots add to the slot's own weights: its column of the state's and the actions' first
layer, its row and bias of the last. Robots that share a slot share its adapter. All start at zero, which changes
nothing, and a product of weights and inputs is linear in them, so adding them to the weights costs nothing at run time.

Source: arXiv 2601.12993, section 5.3.1, eq. 12; placement and size: docs/decisions/0030-embodiment-adapters.md.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A = 200 unified slots, E width of the action stream.

ADAPTER = ".adapter."  # in the names of the bank's parameters


class SlotAdapter(nn.Module):
    """The bank of one layer. weight: (A, E), bias: (A,) or None, row k for slot k.

    active: (A,) bool, the slots that are being trained; the others have gradient 0 whatever passes through them.
    """

    active: Tensor

    def __init__(self, slots: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(slots, width))
        self.bias = nn.Parameter(torch.zeros(slots)) if bias else None
        self.register_buffer("active", torch.ones(slots, dtype=torch.bool, device="cpu"), persistent=False)

    def rows(self) -> Tensor:
        """The weight, to be trained in the active slots alone."""
        return torch.where(self.active[:, None], self.weight, self.weight.detach())

    def offsets(self) -> Tensor:
        """The bias, likewise."""
        assert self.bias is not None, "this bank adapts no bias"
        return torch.where(self.active, self.bias, self.bias.detach())


class SlotInput(nn.Linear):
    """A linear layer whose inputs are slots: an adapter's row k is added to column k of the weight."""

    def __init__(self, slots: int, width: int) -> None:
        super().__init__(slots, width)
        self.adapter = SlotAdapter(slots, width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight + self.adapter.rows().T, self.bias)


class SlotOutput(nn.Linear):
    """A linear layer whose outputs are slots: an adapter is added to the weight, and its bias to the bias."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__(width, slots)
        self.adapter = SlotAdapter(slots, width, bias=True)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight + self.adapter.rows(), self.bias + self.adapter.offsets())


def activate_slots(module: nn.Module, state: Tensor, action: Tensor) -> None:
    """Train the adapters of these slots alone from here on. state, action: (A,) bool, what the run's robots use.

    Adapters must have no weight decay: it would move what no gradient moves.
    """
    for name, part in module.named_modules():
        if isinstance(part, SlotAdapter):
            part.active.copy_(state if name.startswith("state_encoder.") else action)


def fold_adapters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network without adapters: each is added to the weights it stands beside. Any naming of layers."""
    folded = {name: tensor for name, tensor in tensors.items() if ADAPTER not in name}
    for name in tensors.keys() - folded.keys():
        beside = name.replace(ADAPTER, ".")
        slots_leave = name.replace(".weight", ".bias") in tensors
        folded[beside] = tensors[beside] + (tensors[name] if slots_leave else tensors[name].T)
    return folded
