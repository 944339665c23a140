"""The recurrences of the mixers, over the tokens of one call."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supra.kernels.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from supra.kernels.gated_linear_attention import (
    chunk_gated_linear_attention,
    recurrent_gated_linear_attention,
)
from supra.kernels.kda import chunk_kda, recurrent_kda
from supra.kernels.linear_attention import chunk_linear_attention, recurrent_linear_attention
from supra.kernels.nonlinear_gated import chunk_nonlinear_gated, recurrent_nonlinear_gated
from supra.mixers.bounded import Row, Tensors, run_documents, windowed
from supra.mixers.inputs import MixerInputs


class Operation(NamedTuple):
    """A kernel's form for many tokens, and its form for one."""

    chunk: Callable[..., tuple[Tensor, Any]]
    recurrent: Callable[..., tuple[Tensor, Any]]


LINEAR_ATTENTION = Operation(chunk_linear_attention, recurrent_linear_attention)
GATED_LINEAR_ATTENTION = Operation(chunk_gated_linear_attention, recurrent_gated_linear_attention)
GATED_DELTA_RULE = Operation(chunk_gated_delta_rule, recurrent_gated_delta_rule)
KDA = Operation(chunk_kda, recurrent_kda)
NONLINEAR_GATED = Operation(chunk_nonlinear_gated, recurrent_nonlinear_gated)


def scan(
    operation: Operation,
    inputs: MixerInputs,
    *tensors: Tensor,
    log_decay: Tensor | None,
    state: Any,
    return_state: bool,
    **settings: Any,
) -> tuple[Tensor, Any]:
    """Run the operation on tensors [B, T, …]: the query first, then the key, then the others.

    Follows the policy of the call. Padded tokens leave the state as it is: all tensors but the
    query are 0 there, and nothing decays. `settings` are further arguments of the operation.

    Returns the output [B, T, Hq, V], and the new state or None.
    """
    query, *written = tensors
    policy = None if inputs.policy_run is None else inputs.policy_run.policy
    if policy is not None:
        if log_decay is None and policy.decay_scale != 1:
            log_decay = query.new_zeros(written[0].shape[2], dtype=torch.float32)
        log_decay = None if log_decay is None else policy.scaled_log_decay(log_decay)
        written[0] = policy.scaled(written[0])
    if inputs.padding_mask is not None:
        written = [x.masked_fill(~_beside(inputs.padding_mask, x), 0) for x in written]
        if log_decay is not None:
            log_decay = torch.where(_beside(inputs.padding_mask, log_decay), log_decay, 0.0)
    if inputs.watch is not None:
        inputs.watch(log_decay)

    def recurrence(tensors: Tensors, row: Row) -> tuple[Tensor, Any]:
        query, *written, log_decay = tensors
        given = settings | {"initial_state": row.state, "return_state": row.return_state}
        if row.cu_seqlens is not None:
            given["cu_seqlens"] = row.cu_seqlens
        form = operation.recurrent if query.shape[1] == 1 else operation.chunk
        return form(query, *written, log_decay=log_decay, **given)

    tensors = query, *written, log_decay
    window = functools.partial(windowed, recurrence)
    output, end = run_documents(recurrence, window, inputs, tensors, state, return_state)
    return output.reshape(*query.shape[:3], -1), end


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    """The mask [B, T] as [B, T, 1, …], to broadcast with x [B, T, …] or with x [H]."""
    return mask[(..., *[None] * max(1, x.dim() - 2))]
