"""A model that the main process reads and all processes have parts of, under FSDP2.

The other processes make the same model on the meta device, where weights have a shape and no
memory. When FSDP has split both, the main process sends every process its part, one tensor at a
time. So only the main process ever holds a whole model.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from supra.checkpoint.config_rules import meta_model
from supra.checkpoint.opening import Checkpoint
from supra.model.attention import blocks_of
from supra.uptrain.processes import on_main


class Held(NamedTuple):
    """A parameter or buffer before FSDP splits it, in one of its places: `module` and `name`.

    Places of the same tensor have the same key. Only the main process has values; FSDP does not
    move these to a GPU, as it does with the parameter itself.
    """

    module: nn.Module
    name: str
    key: int
    values: Tensor

    @property
    def tensor(self) -> Tensor:
        """What is in this place now."""
        return getattr(self.module, self.name)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether processes have parts of the models."""
    return accelerator.distributed_type == DistributedType.FSDP


def load(accelerator: Accelerator, checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model, on the accelerator's device. Under FSDP it is in the main process's host memory,
    and the other processes have it without weights. Raises UserError in every process."""
    if not is_sharded(accelerator):
        return checkpoint.model(dtype).to(accelerator.device)
    read: list[PreTrainedModel] = []

    def dtypes() -> list[torch.dtype]:
        read.append(checkpoint.model(dtype))
        return [held.values.dtype for held in hold(read[0])]

    found = on_main(accelerator, dtypes)
    if read:
        return read[0]
    model = meta_model(checkpoint.config()).eval()
    for held, own in zip(hold(model), found, strict=True):
        held.tensor.data = held.values.to(own)
    return model


def hold(model: nn.Module) -> list[Held]:
    """All parameters and buffers, with tied ones in each of their places."""
    return [
        Held(module, name, id(tensor), tensor.detach())
        for module in model.modules()
        for name, tensor in _own(module)
    ]


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """accelerator.prepare, of a model that `load` made."""
    held = hold(model)
    numbers = {id(weight): number for number, weight in enumerate(model.parameters())}
    groups = [[numbers[id(x)] for x in group["params"]] for group in optimizer.param_groups]
    model, optimizer = accelerator.prepare(model, optimizer)
    if is_sharded(accelerator):
        fill(accelerator, held)
        # accelerate finds them again by address, which is 0 for all on the meta device
        weights = list(model.parameters())
        for group, of_group in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [weights[number] for number in of_group]
    return model, optimizer


def fill(accelerator: Accelerator, held: list[Held]) -> None:
    """Give every process its parts of what the main process holds, and the whole of what FSDP has
    not split."""
    filled: dict[int, Tensor] = {}
    for x in held:
        if x.key not in filled:
            filled[x.key] = _part(accelerator, x.tensor, x.values)
        setattr(x.module, x.name, filled[x.key])


def shard_blocks(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Split the blocks of a model that is not trained. What is outside of them stays whole in every
    process, because a head runs without the rest of its model."""
    held, settings = hold(model), fsdp_settings(accelerator)
    for block in blocks_of(model):
        fully_shard(block, **settings)
    fill(accelerator, held)


def fsdp_settings(accelerator: Accelerator) -> dict:
    """The launcher's settings for fully_shard."""
    return {
        "mesh": _mesh(accelerator),
        "offload_policy": accelerator.state.fsdp_plugin.cpu_offload,
        "reshard_after_forward": True,
    }


def _mesh(accelerator: Accelerator) -> DeviceMesh:
    mesh = accelerator.torch_device_mesh
    if mesh is None:
        return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    return mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _part(accelerator: Accelerator, place: Tensor, values: Tensor) -> Tensor:
    """This process's part of the main process's values, like what FSDP has put in their place."""
    if accelerator.is_main_process:
        part = values.to(accelerator.device).contiguous()
    else:
        part = torch.empty(values.shape, dtype=values.dtype, device=accelerator.device)
    if isinstance(place, DTensor):
        part = distribute_tensor(part, place.device_mesh, place.placements)
        if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            part = part.to("cpu")
    else:
        broadcast(part, src=0)
    if isinstance(place, nn.Parameter):
        return nn.Parameter(part, requires_grad=place.requires_grad)
    return part
