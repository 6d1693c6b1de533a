"""All that a stopped run needs to go on, in one file that is there whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from onbeat.embodiment.errors import OnbeatError
from onbeat.training.parallel import gather, rank, spread

STATE_FILE = "resume/fit.safetensors"  # not beside the weights: a checkpoint's *.safetensors are all read
OPTIMISER = "optimiser"


class ResumeError(OnbeatError):
    """There is nothing to resume, or it belongs to another recipe."""


def save_state(
    folder: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, metadata: Mapping[str, str]
) -> None:
    """Write weights and moments. Every process calls it, the first writes.

    The optimiser's parameters are all among those of `modules`, by whose names their moments go.
    """
    tensors = gather({**_weights(modules), **_moments(modules, optimiser)})
    if rank() != 0:
        return
    path = folder / STATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=dict(metadata))
    os.replace(partial, path)


def load_state(
    folder: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, recipe: str
) -> Mapping[str, str]:
    """Take over what `save_state` wrote; returns its metadata. Raises ResumeError."""
    metadata, tensors = _read(folder / STATE_FILE)
    if metadata["recipe"] != recipe:
        raise ResumeError(
            f"{folder / STATE_FILE} was written by another recipe: restore that one, or start without --resume"
        )
    for part, module in modules.items():
        state = module.state_dict()
        module.load_state_dict(spread({name: tensors[f"{part}.{name}"] for name in state}, state))
    _load_moments(modules, optimiser, tensors)
    return metadata


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return file.metadata(), {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as problem:
        raise ResumeError(f"{path} cannot be read ({problem}): start without --resume") from None


def _weights(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part, m in modules.items() for name, tensor in m.state_dict().items()}


def _moments(modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{OPTIMISER}.{name}.{moment}": tensor
        for name, parameter in _optimised(modules, optimiser)
        for moment, tensor in optimiser.state.get(parameter, {}).items()
    }


def _optimised(
    modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer
) -> Iterator[tuple[str, nn.Parameter]]:
    held = {parameter for group in optimiser.param_groups for parameter in group["params"]}
    for part, module in modules.items():
        yield from ((f"{part}.{name}", p) for name, p in module.named_parameters() if p in held)


def _load_moments(
    modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{OPTIMISER}."):
            parameter, moment = name.removeprefix(f"{OPTIMISER}.").rsplit(".", 1)
            moments.setdefault(parameter, {})[moment] = tensor
    for name, parameter in _optimised(modules, optimiser):
        if name in moments:
            optimiser.state[parameter] = _placed(moments[name], parameter)


def _placed(moments: Mapping[str, Tensor], parameter: nn.Parameter) -> dict[str, Tensor]:
    """On the parameter's device, and cut as it is; the step count is one number for all."""
    whole = {name: tensor.to(parameter.device) for name, tensor in moments.items()}
    return spread(whole, {name: parameter for name in whole if name != "step"})
