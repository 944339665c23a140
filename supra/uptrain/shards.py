"""FSDP2 where one attention module at a time is trained: each is a unit of its own.

FSDP makes the weights of a unit whole while it runs, forward and backward, and then shares out its
gradients. The teacher that the modules learn from is split in the same way, into units of a block.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from supra.model.attention import attention_modules

Place = tuple[nn.Module, str]
"""A module and the name of one of its own parameters."""


def attention_classes(model: nn.Module) -> list[str]:
    """The names of the classes of the attention modules."""
    return sorted({type(attention).__name__ for attention in attention_modules(model)})


def shared_weights(teacher: nn.Module, student: nn.Module) -> list[tuple[Place, Place]]:
    """The places of every parameter that both models have, in the teacher and in the student."""
    places = {id(getattr(*place)): place for place in _places(student)}
    found = ((place, places.get(id(getattr(*place)))) for place in _places(teacher))
    return [(own, other) for own, other in found if other is not None]


def shard_teacher(
    accelerator: Accelerator,
    teacher: nn.Module,
    student: nn.Module,
    shared: Sequence[tuple[Place, Place]],
) -> None:
    """Split the teacher like the prepared student, whose parts of shared weights it uses."""
    settings = {
        "mesh": next(student.parameters()).device_mesh,
        "offload_policy": accelerator.state.fsdp_plugin.cpu_offload,
        "reshard_after_forward": True,
    }
    names = teacher._no_split_modules
    for block in [x for x in teacher.modules() if type(x).__name__ in names]:
        fully_shard(block, **settings)
    fully_shard(teacher, **settings)
    for (module, name), other in shared:
        # a new parameter, because FSDP may give it a copy of an uneven part
        setattr(module, name, nn.Parameter(getattr(*other).detach(), requires_grad=False))


@torch.no_grad()
def run_whole(model: nn.Module, device: torch.device) -> None:
    """Run the prepared model on two tokens. FSDP takes the module that runs first for the outermost
    one, and only after that may a unit run alone."""
    was_training = model.training
    model.eval()
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    model.train(was_training)


def reshard(model: nn.Module) -> None:
    """Take apart what a pass without a gradient has left whole. FSDP notices a change of
    requires_grad only when it makes a unit whole. Nothing without FSDP."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(x: Tensor) -> Tensor:
    """The tensor that the processes have parts of; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _places(model: nn.Module) -> list[Place]:
    return [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_parameters(recurse=False)
    ]
