"""Rows of a run that lie on several processes: cp_size in accelerate's parallelism_config."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from supra.data.packing import Block
from supra.model.sequence_parallel import RowRanks, sequence_parallel
from supra.uptrain.accelerator import processes_of_a_row


class SharedRows:
    """Processes with neighbouring numbers share their rows, and each has a part of every row.

    `readers` groups of processes read different rows, and this process is in group `reader`.
    """

    def __init__(self, accelerator: Accelerator):
        self.size = processes_of_a_row()
        self.reader, self.rank = divmod(accelerator.process_index, self.size)
        self.readers = accelerator.num_processes // self.size
        self.group = dist.new_subgroups(self.size)[0] if self.size > 1 else None

    def shared_by(self, model: nn.Module) -> AbstractContextManager[RowRanks | None]:
        """The context of a step's forward and backward passes."""
        return nullcontext() if self.size == 1 else sequence_parallel(model, self.group)

    def part(self, x: Tensor) -> Tensor:
        """This process's part of whole rows [B, L]."""
        return x.tensor_split(self.size, dim=1)[self.rank]

    def part_of(self, batch: Block) -> Block:
        return {name: self.part(column) for name, column in batch.items()}

    def places(self, rows: slice, batch: Block) -> slice | Tensor:
        """Rows of the flattened part of a batch, as rows of the whole batch when flattened."""
        ids = batch["input_ids"]
        if self.size == 1:
            return rows
        return self.part(torch.arange(ids.numel(), device=ids.device).view_as(ids)).flatten()[rows]
