"""Training on several processes: PyTorch's FSDP2, started by `torchrun`. Alone, everything here does nothing.

Every process holds a share of every parameter, gradient and moment, and works on its own share of each batch. Losses
are sums over a process's entries divided by the count over all of them (`global_sum`), so gradients are added, not
averaged, and the result is that of one process with the whole batch.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from onbeat.training.model.decoder import Layer as DecoderLayer
from onbeat.training.model.experts import Experts
from onbeat.training.model.policy import Policy
from onbeat.training.model.vision import Layer as VisionLayer

Part = TypeVar("Part")

# What is gathered, used and let go as one, and by which methods besides `forward` it is called from outside. None
# of them calls another: FSDP2 would let go of the whole too early. The policy's own weights stay until the way back.
UNITS: dict[type[nn.Module], tuple[str, ...]] = {
    VisionLayer: (),
    DecoderLayer: ("prefix_cache", "advance"),
    Policy: ("encode_prefixes", "flows", "decode_velocity"),
}


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that `torchrun` started, and leave them at the end. Without torchrun: nothing.

    NCCL on GPUs, one per process; gloo on CPUs.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> int:
    """How many processes train together; 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0. Rank 0 alone writes and talks."""
    return dist.get_rank() if dist.is_initialized() else 0


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    """Wait for the others: before one reads what another wrote."""
    if dist.is_initialized():
        dist.barrier()


def share(items: Tensor) -> Tensor:
    """This process's part of a batch of items, which every process draws alike. Parts differ by one item at most."""
    return items.tensor_split(world())[rank()]


def global_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, without a gradient. For counts, and for losses to be logged."""
    total = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def everyones(own: Part) -> list[Part]:
    """What each process has, by rank; all must call it. For small things that are told."""
    if not dist.is_initialized():
        return [own]
    parts = [own] * world()
    dist.all_gather_object(parts, own)
    return parts


def shard(module: nn.Module, compute: torch.dtype | None = None) -> None:
    """Keep only this process's share of the weights from here on; call before the optimiser is made, alike everywhere.

    compute: the type in which layers calculate and are gathered, float32 masters kept and gradients added in float32.
    A copy for the moving average must be made before, and is sharded by a call of its own.
    """
    if not dist.is_initialized():
        return
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for part, methods in [*_units(module), (module, _methods(module))]:
        fully_shard(part, mp_policy=precision)
        for method in methods:
            register_fsdp_forward_method(part, method)
    for part in _sharded(module):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    for experts in (part for part in module.modules() if isinstance(part, Experts)):
        experts.touch_all = True  # gradients are added by position: every process must have the same ones


def sharded_parts(module: nn.Module) -> list[list[nn.Parameter]]:
    """The weights that are gathered together, unit by unit; the last is what belongs to the module itself."""
    units = [list(unit.parameters()) for unit, _ in _units(module)]
    taken = {id(parameter) for unit in units for parameter in unit}
    return [*units, [parameter for parameter in module.parameters() if id(parameter) not in taken]]


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """The module's weights gathered while it is only read, such as by a sampler that calls its parts one by one."""
    for part in _sharded(module):
        part.unshard()
    try:
        yield
    finally:
        for part in _sharded(module):
            part.reshard()


def leave_untouched(module: nn.Module) -> None:
    """Weights that no process used in this step have no gradient, as when alone, instead of zeros: call after backward.

    The optimiser would decay them and go on with their momentum, such as those of experts that nobody chose.
    """
    gradients = [(parameter, parameter.grad) for parameter in module.parameters() if parameter.grad is not None]
    if not (dist.is_initialized() and gradients):
        return
    used = global_sum(torch.stack([_local(gradient).any().float() for _, gradient in gradients]))
    for (parameter, _), times in zip(gradients, used.tolist(), strict=True):
        if not times:
            parameter.grad = None


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm over all processes is at most `limit`; returns the norm before."""
    return _full(nn.utils.clip_grad_norm_(parameters, limit))


@torch.no_grad()
def follow(average: nn.Module, newest: nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) newest, share by share."""
    pairs = [(_local(a), _local(n)) for a, n in zip(average.parameters(), newest.parameters(), strict=True)]
    ours, theirs = [average for average, _ in pairs], [newest for _, newest in pairs]
    torch._foreach_lerp_(ours, theirs, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU, on rank 0; nothing on the others, which must call it too."""
    whole_tensors = ((name, _full(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.to("cpu", copy=True) for name, tensor in whole_tensors if rank() == 0}


def spread(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, which every process has alike, cut to this process's share wherever `like` is cut."""
    return {name: _cut(tensor, like[name]) if name in like else tensor for name, tensor in tensors.items()}


def save_shares(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors without gathering them: each process its own share, as safetensors in `folder`, which is new."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(_detached(tensors), storage_writer=writer, no_dist=not dist.is_initialized())


def load_shares(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `save_shares` wrote, on however many processes; each reads no more than its own share.

    like: for every name in the folder a tensor of its shape, cut as the result is to be.
    """
    reader = HuggingFaceStorageReader(str(folder))
    names = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty_like(like[name]).detach() for name in names}
    load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return tensors


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _units(module: nn.Module) -> list[tuple[nn.Module, tuple[str, ...]]]:
    children = (child for child in module.modules() if child is not module)
    return [(child, _methods(child)) for child in children if isinstance(child, tuple(UNITS))]


def _methods(part: nn.Module) -> tuple[str, ...]:
    return next((methods for kind, methods in UNITS.items() if isinstance(part, kind)), ())


def _sharded(module: nn.Module) -> Sequence[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _cut(tensor: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
