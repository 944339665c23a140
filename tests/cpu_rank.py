"""One process of `accelerate launch`, on a CPU: `python -m tests.cpu_rank --config …`.

accelerate ignores FSDP on CPUs; this module makes it use FSDP there. Weights that FSDP offloads to
the CPU are then in memory that is not pinned, because torch pins memory for a GPU only.
"""

import functools
import os
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy


def shard_on_cpus() -> None:
    """Let accelerate take an fsdp_plugin on CPUs."""
    initialize = AcceleratorState.__init__

    @functools.wraps(initialize)
    def wrapped(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if isinstance(fsdp_plugin.cpu_offload, CPUOffloadPolicy):
                fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = wrapped


def run(arguments: list[str], environment: dict[str, str]) -> None:
    """`supra uptrain ARGUMENTS` in this process, with the variables that a launcher sets."""
    os.environ.update(environment)
    shard_on_cpus()
    from supra.cli import main

    main(["uptrain", *arguments])


if __name__ == "__main__":
    run(sys.argv[1:], {})
