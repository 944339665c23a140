"""FSDP2 where one attention module at a time is trained: each is a unit of its own.

FSDP makes the weights of a unit whole while it runs, forward and backward, and then shares out its
gradients. The teacher that the modules learn from is split in the same way, into units of a block.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from supra.model.attention import attention_modules, blocks_of
from supra.uptrain.spread import fill, fsdp_settings, hold

CHECKPOINTED = "_checkpoint_wrapped_module."  # in names of blocks with activation checkpointing
Place = tuple[nn.Module, str]
"""A module and the name of one of its own parameters."""


def attention_classes(model: nn.Module) -> list[str]:
    """The names of the classes of the attention modules."""
    return sorted({type(attention).__name__ for attention in attention_modules(model)})


def separate(teacher: nn.Module, student: nn.Module) -> list[tuple[Place, Place]]:
    """Take the weights that it shares with the student out of the teacher, which then has them
    without memory. Returns their places, in the teacher and in the student."""
    places = {x.key: (x.module, x.name) for x in hold(student)}
    weights = [x for x in hold(teacher) if isinstance(x.tensor, nn.Parameter) and x.key in places]
    for x in weights:
        setattr(x.module, x.name, nn.Parameter(x.values.to("meta"), requires_grad=False))
    return [((x.module, x.name), places[x.key]) for x in weights]


def shard_teacher(
    accelerator: Accelerator, teacher: nn.Module, shared: Sequence[tuple[Place, Place]]
) -> None:
    """Split the teacher like the prepared student, and give it the student's parts of the shared
    weights."""
    students = {(id(module), name) for (module, name), _ in shared}
    held = [x for x in hold(teacher) if (id(x.module), x.name) not in students]
    settings = fsdp_settings(accelerator)
    for block in blocks_of(teacher):
        fully_shard(block, **settings)
    fully_shard(teacher, **settings)
    fill(accelerator, held)
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


def expect_moments(model: nn.Module, checkpoint: Path) -> None:
    """Let those weights require a gradient whose moments an optimizer has saved in a checkpoint.

    When it is loaded, torch expects moments of every weight that requires a gradient, and a stage
    that trains layers one by one gives them to the weights of these layers alone.
    """
    whole = checkpoint / "optimizer.bin"
    if whole.exists():
        saved = torch.load(whole, mmap=True, weights_only=True)["state"]
    else:
        saved = FileSystemReader(checkpoint / "optimizer_0").read_metadata().state_dict_metadata
        moments = (re.fullmatch(r"optimizer\.state\.(.*)\.exp_avg", name) for name in saved)
        saved = {found[1] for found in moments if found}
    reshard(model)  # the optimizer has the parts
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.replace(CHECKPOINTED, "") in saved)


def whole(x: Tensor) -> Tensor:
    """The tensor that the processes have parts of; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x
