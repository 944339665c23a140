"""Models whose weights lie on the disk, or in memory beside a GPU.

Accelerate brings the weights of each module in for the time of its own `forward`. What reads them
at another time asks for them here.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from accelerate.utils import align_module_device
from torch import nn


@contextmanager
def weights_of(module: nn.Module) -> Iterator[None]:
    """Inside, the weights of a module and its parts are on the device where it runs. A part whose
    own `forward` runs inside has none after it."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield
