"""Checks that weights and predictions are finite before they are saved."""

import math

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supra.data.packing import Block

LARGEST = 1e18  # of a weight: norms take squares, and float32 ends at 3e38
TOKENS = 128  # of the row that a model is tried on


@torch.no_grad()
def first_not_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """The first weight that is beyond LARGEST or NaN, or moment of AdamW that is infinite or NaN.

    Every process checks its own shards; all get the same answer.
    """
    weights = dict(model.named_parameters())
    bad = [name for name, x in weights.items() if not _finite(x, LARGEST)]
    names = {id(x): name for name, x in weights.items()}
    for weight, state in optimizer.state.items():
        bad += [f"{key} of {names[id(weight)]}" for key, x in state.items() if not _finite(x)]
    return next(filter(None, gather_object(bad[:1])), None)


@torch.no_grad()
def predicts(model: nn.Module, row: Block, device: torch.device) -> bool:
    """Whether the logits of a row's [1, T] first tokens are finite in all processes: weights may be
    finite and still too large to compute with."""
    was_training = model.training
    model.eval()
    inputs = {x: row[x][:, :TOKENS].to(device) for x in ("input_ids", "position_ids")}
    logits = model(**inputs, use_cache=False).logits
    model.train(was_training)
    return all(gather_object([_finite(logits.float().logsumexp(-1))]))


def _finite(x: Tensor, largest: float = math.inf) -> bool:
    x = x.to_local() if isinstance(x, DTensor) else x
    return bool((x.isfinite() & (x.abs() <= largest)).all())
