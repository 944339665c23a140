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

# Takes tensors of a call and a state before each sequence; returns the states after them.
End = Callable[[Tensors, Any], Any]


class Operation(NamedTuple):
    """A kernel's form for many tokens, and its form for one.

    transition: what the tokens of each row do to a state before them, as `RowPart.state_before`
        takes it; None for a recurrence that is not linear in its state.
    """

    chunk: Callable[..., tuple[Tensor, Any]]
    recurrent: Callable[..., tuple[Tensor, Any]]
    transition: Callable[[Tensors, MixerInputs, End], Tensor] | None = None


def decays(tensors: Tensors, inputs: MixerInputs, end: End) -> Tensor:
    """The product of all decays: [B, H, 1 or K, 1], or [B, 1, 1, 1] if nothing decays."""
    query, *_, log_decay = tensors
    if log_decay is None:
        return torch.ones_like(query[:, :1, :1, :1])
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(*query.shape[:2], -1)
    total = log_decay.sum(1).exp()
    return total[..., None] if total.dim() == 3 else total[..., None, None]


def products(tensors: Tensors, inputs: MixerInputs, end: End) -> Tensor:
    """The product of the matrices of all tokens [B, H, K, K]: what becomes of an identity while
    only zeros are written."""
    query, key, value, *others = tensors
    size = key.shape[3]
    identity = torch.eye(size, dtype=torch.float32, device=key.device)
    count = len(query) if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    nothing = value.new_zeros(*value.shape[:3], size)
    state = end((query, key, nothing, *others), identity.expand(count, key.shape[2], -1, -1))
    return inputs.part.of_rows(state, inputs.cu_seqlens)


LINEAR_ATTENTION = Operation(chunk_linear_attention, recurrent_linear_attention, decays)
GATED_LINEAR_ATTENTION = Operation(
    chunk_gated_linear_attention, recurrent_gated_linear_attention, decays
)
GATED_DELTA_RULE = Operation(chunk_gated_delta_rule, recurrent_gated_delta_rule, products)
KDA = Operation(chunk_kda, recurrent_kda, products)
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
    if inputs.part is not None:
        state = _state_before(operation, recurrence, inputs, tensors)
    output, end = run_documents(recurrence, window, inputs, tensors, state, return_state)
    return output.reshape(*query.shape[:3], -1), end


def _state_before(
    operation: Operation,
    recurrence: Callable[[Tensors, Row], tuple[Tensor, Any]],
    inputs: MixerInputs,
    tensors: Tensors,
) -> Any:
    """The states before the sequences of a part of the rows."""

    def end(tensors: Tensors, state: Any) -> Any:
        return run_documents(recurrence, None, inputs, tensors, state, True)[1]

    state = end(tensors, None)
    transition = operation.transition(tensors, inputs, end)
    if isinstance(state, Tensor):
        return inputs.part.state_before(transition, state, inputs.cu_seqlens)
    memory, normalizer = state  # of linear attention: the normalizer is one more column of values
    joined = memory if normalizer is None else torch.cat([memory, normalizer[..., None]], dim=-1)
    before = inputs.part.state_before(transition, joined, inputs.cu_seqlens)
    if normalizer is None:
        return state._replace(memory=before)
    return state._replace(memory=before[..., :-1], normalizer=before[..., -1])


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    """The mask [B, T] as [B, T, 1, …], to broadcast with x [B, T, …] or with x [H]."""
    return mask[(..., *[None] * max(1, x.dim() - 2))]
