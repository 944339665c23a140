"""What all processes of a run do together."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

from supra.uptrain.end_to_end import EndToEnd
from supra.uptrain.processes import autocast


@pytest.mark.parametrize("keeps_casts", [True, False])
def test_casts_of_weights(keeps_casts):
    """Two products with one weight keep one cast of it, or two."""
    weight, kept = torch.ones(3, 3, requires_grad=True), set()

    def keep(x):
        kept.add(x.data_ptr())
        return x

    inputs = [torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with autocast(torch.device("cpu"), "bf16", keeps_casts), hooks:
        products = [x @ weight for x in inputs]
    assert all(x.dtype == torch.bfloat16 for x in products)
    assert len(kept - {x.data_ptr() for x in inputs}) == (1 if keeps_casts else 2)


@pytest.mark.parametrize(("kind", "waits"), [("FSDP", False), ("MULTI_GPU", True)])
def test_under_fsdp_gradients_are_added_up_after_every_pass(kind, waits):
    """Until then each process would hold the gradient of the whole student."""
    objective = object.__new__(EndToEnd)
    objective.model = "model"
    objective.accelerator = SimpleNamespace(
        distributed_type=DistributedType(kind), no_sync=lambda model: f"{model} waits"
    )
    assert (objective._exchange(last=False) == "model waits") == waits
    assert isinstance(objective._exchange(last=True), nullcontext)
