"""One process of a run whose other processes do not exist.

torch's fake process group answers every exchange at once, with nothing in it. So one process goes
through all that a rank of many does, and takes the memory that such a rank takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from supra.planning.hardware import SHARDED, Hardware

CPU = torch.device("cpu")


class FakeRank:
    """The first process, in the place of a run's Accelerator: it has what models are wrapped with.

    Splitting is accelerate's own, as `accelerate launch` and the file of recipes/launch ask for it.
    """

    device = CPU
    mixed_precision = "no"
    is_main_process = True

    def __init__(self, hardware: Hardware):
        self.num_processes = hardware.processes
        self.distributed_type = DistributedType.NO
        if hardware.launch == "ddp":
            self.distributed_type = DistributedType.MULTI_CPU
        if hardware.launch in SHARDED:
            self.distributed_type = DistributedType.FSDP
            self.parallelism_config = ParallelismConfig(
                dp_replicate_size=hardware.processes // hardware.shards,
                dp_shard_size=hardware.shards,
            )
            self.torch_device_mesh = self.parallelism_config.build_device_mesh("cpu")
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                cpu_ram_efficient_loading=False,
            )
            self.state = SimpleNamespace(fsdp_plugin=plugin)

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The wrapped model; spread.prepare gives the optimizer its weights."""
        if self.distributed_type == DistributedType.FSDP:
            model = fsdp2_prepare_model(self, model)
        elif self.distributed_type != DistributedType.NO:
            model = DistributedDataParallel(model, init_sync=False)
            model.register_comm_hook(None, _as_it_is)
        return model, optimizer


def _as_it_is(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The sum of gradients over processes: the fake group's own exchange returns nothing."""
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@contextmanager
def fake_rank(hardware: Hardware) -> Iterator[FakeRank]:
    """Inside, torch takes this process for the first of all."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=hardware.processes)
    try:
        yield FakeRank(hardware)
    finally:
        dist.destroy_process_group()
