"""Gradient checkpointing: layers forget what they computed and compute it again on the way back."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from onbeat.training.model.policy import Policy


def recompute_layers(policy: Policy) -> None:
    """From here on the layers of both stacks keep their inputs alone; gradients are the same, a step costs more.

    Call after the average was copied, and before the weights are shared among processes.
    """
    for layer in policy.language_model.stack:
        _forget(layer, "forward")
        _forget(layer, "advance")
    for layer in policy.vit_model.encoder.layers:
        _forget(layer, "forward")


def _forget(module: nn.Module, method: str) -> None:
    whole: Callable[..., Any] = getattr(module, method)

    def again(*inputs: Any) -> Any:
        return checkpoint(whole, *inputs, use_reentrant=False)

    setattr(module, method, again)
