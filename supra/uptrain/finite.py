"""Checks that weights and outputs are finite before they are saved."""

import math

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supra.data.packing import Block
from supra.uptrain.compiled import eagerly

LARGEST = 1e18  # maximum size of a weight: norms take squares, and float32 ends at 3e38
TOKENS = 128  # tokens of the row that the model is tried on


@torch.no_grad()
def first_not_finite(
    model: nn.Module, optimizer: torch.optim.Optimizer, row: Block | None, device: torch.device
) -> str | None:
    """The first weight that is NaN or larger than LARGEST, or moment of AdamW that is not finite;
    else "the model's output" if the logits for `row` [1, T] are not finite.

    Every process checks its own shards, and all processes get the same answer.
    """
    weights = dict(model.named_parameters())
    bad = [name for name, x in weights.items() if not _finite(x, LARGEST)]
    names = {id(x): name for name, x in weights.items()}
    for weight, state in optimizer.state.items():
        bad += [f"{key} of {names[id(weight)]}" for key, x in state.items() if not _finite(x)]
    if found := next(filter(None, gather_object(bad[:1])), None):
        return found
    return None if row is None or _predicts(model, row, device) else "the model's output"


def _predicts(model: nn.Module, row: Block, device: torch.device) -> bool:
    """Whether the logits of the row's first tokens are finite in all processes. Finite weights may
    be too large to compute with."""
    was_training = model.training
    model.eval()
    inputs = {x: row[x][:, :TOKENS].to(device) for x in ("input_ids", "position_ids")}
    with eagerly():
        logits = model(**inputs, use_cache=False).logits
    model.train(was_training)
    return all(gather_object([_finite(logits.float().logsumexp(-1))]))


def _finite(x: Tensor, largest: float = math.inf) -> bool:
    x = x.to_local() if isinstance(x, DTensor) else x
    return bool((x.isfinite() & (x.abs() <= largest)).all())
