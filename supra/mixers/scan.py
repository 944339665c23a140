"""One recurrence over the tokens of a call, in the form that the call has."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supra.kernels.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from supra.kernels.gated_linear_attention import (
    chunk_gated_linear_attention,
    recurrent_gated_linear_attention,
)
from supra.kernels.linear_attention import chunk_linear_attention, recurrent_linear_attention
from supra.mixers.base import MixerInputs


class Operation(NamedTuple):
    """An operation's form for many tokens, and its form for one."""

    chunk: Callable[..., tuple[Tensor, Any]]
    recurrent: Callable[..., tuple[Tensor, Any]]


LINEAR_ATTENTION = Operation(chunk_linear_attention, recurrent_linear_attention)
GATED_LINEAR_ATTENTION = Operation(chunk_gated_linear_attention, recurrent_gated_linear_attention)
GATED_DELTA_RULE = Operation(chunk_gated_delta_rule, recurrent_gated_delta_rule)


def scan(
    operation: Operation,
    inputs: MixerInputs,
    *tensors: Tensor,
    log_decay: Tensor | None,
    state: Any,
    return_state: bool,
    **settings: Any,
) -> tuple[Tensor, Any]:
    """Run the operation on tensors [B, T, …], the query first.

    Padded tokens change no state: all tensors but the query are 0 there, and nothing decays.
    """
    query, *written = tensors
    if inputs.padding_mask is not None:
        written = [x * _beside(inputs.padding_mask, x) for x in written]
        if log_decay is not None:
            log_decay = torch.where(_beside(inputs.padding_mask, log_decay), log_decay, 0.0)
    settings |= {"log_decay": log_decay}
    if query.shape[1] == 1 or inputs.cu_seqlens is None:
        form = operation.recurrent if query.shape[1] == 1 else operation.chunk
        settings |= {"initial_state": state, "return_state": return_state}
        return form(query, *written, **settings)
    if log_decay is not None and log_decay.dim() > 1:
        settings["log_decay"] = log_decay.flatten(0, 1)[None]
    rows = (x.flatten(0, 1)[None] for x in (query, *written))
    output, _ = operation.chunk(*rows, cu_seqlens=inputs.cu_seqlens, **settings)
    return output.view(*query.shape[:3], -1), None


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    """[B, T] as [B, T, 1, …], to go with x [B, T, …] or with one x [H] for all tokens."""
    return mask[(..., *[None] * max(1, x.dim() - 2))]
