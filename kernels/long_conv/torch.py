"""The convolution in plain torch: products with small Toeplitz matrices, and a state a chunk.

The outer products k_t v_t^T are K * V columns of numbers over time, all filtered by the model of
their head. So a head is one matrix, its rows the chunks of all columns and sequences, and a chunk
of n tokens costs three products: of its inputs with the Toeplitz matrix of the taps, of its inputs
with what makes them a state, and of the state that it enters with, with what reads it.
"""

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.long_conv.modes import Model, polar, wide
from supra.kernels.long_conv.torch_blocks import Filters, lanes_of, split_groups, state_of


def chunk_forward(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of operator.forward."""
    filters = Filters(log_decay, frequency, weight, skip, min(chunk_size, value.shape[1]))
    end = start(state, key, value, log_decay, checks.sequences(value, cu_seqlens))
    columns = end[0, :, 0, 0].numel()
    output = value.new_empty(value.shape)
    for group in split_groups(value, cu_seqlens, columns, filters.size):
        memory = lanes_of(end[group.states])
        for block in group.blocks(filters, columns):
            found, memory = block.convolve(block.outer(key, value), memory)
            block.contract(found, query, 2, output)
        end[group.states] = state_of(memory)
    return output, end


def chunk_backward(
    d_output: Tensor,
    d_end: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    chunk_size: int,
) -> tuple[Tensor | None, ...]:
    """Arguments and results are those of operator.backward; the states are computed again."""
    filters = Filters(log_decay, frequency, weight, skip, min(chunk_size, value.shape[1]))
    sequences = checks.sequences(value, cu_seqlens)
    first = start(state, key, value, log_decay, sequences)
    d_state = start(d_end, key, value, log_decay, sequences)
    columns = first[0, :, 0, 0].numel()
    d_query, d_key, d_value = (
        None if x is None else x.new_empty(x.shape) for x in (query, key, value)
    )
    for group in split_groups(value, cu_seqlens, columns, filters.size):
        memory, d_memory = lanes_of(first[group.states]), lanes_of(d_state[group.states])
        blocks, before = list(group.blocks(filters, columns)), []
        for block in blocks:
            before.append(memory)
            if block is not blocks[-1]:
                _, memory = block.states(block.outer(key, value), memory)
        for block in reversed(blocks):
            inputs, d_found = block.outer(key, value), block.outer(query, d_output)
            states, _ = block.states(inputs, before.pop())
            if query is not None:
                block.contract(block.read(inputs, states), d_output, 3, d_query)
            d_inputs, d_memory = block.d_convolve(inputs, states, d_found, d_memory)
            if key is not None:
                block.contract(d_inputs, value, 3, d_key)
            block.contract(d_inputs, key, 2, d_value)
        d_state[group.states] = state_of(d_memory)
    return d_query, d_key, d_value, *filters.gradients(), None if state is None else d_state


def recurrent(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor,
    frequency: Tensor,
    weight: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence of api.py, token by token. Shapes and results as there."""
    dtype = log_decay.dtype
    if state is None:
        state = start(None, key, value, log_decay, value.shape[0])
    # in real numbers, which a step needs to be exported
    sizes, angles = polar(Model(log_decay, frequency, weight, skip), 1)
    keep, turn = sizes * angles.cos(), sizes * angles.sin()
    keep, turn = keep[..., None, None, None], torch.stack((-turn, turn), -1)[..., None, None]
    read = 2 * torch.stack((weight[..., 0], -weight[..., 1]), -1).flatten(1)[:, None]
    outputs = []
    for t in range(value.shape[1]):
        new = value[:, t, :, None].to(dtype)
        if key is not None:
            new = key[:, t, :, :, None].to(dtype) * new
        before = wide(state)
        after = torch.addcmul(before * keep, before.flip(3), turn)
        after[:, :, :, 0] += new[:, :, None]
        state = state.copy_(after) if in_place else after.to(dtype)
        seen = torch.matmul(read, state.flatten(4).flatten(2, 3)).view(new.shape)
        if skip is not None:
            seen = seen + skip[:, None, None] * new
        if query is not None:
            seen = query[:, t, :, :, None].to(dtype) * seen
        outputs.append(seen.sum(2).to(value.dtype))
    return torch.stack(outputs, 1), state


def start(
    state: Tensor | None, key: Tensor | None, value: Tensor, log_decay: Tensor, sequences: int
) -> Tensor:
    """A copy of the given state [N, H, M, 2, K, V], or zeros."""
    if state is not None:
        return state.clone(memory_format=torch.contiguous_format)
    key_width = 1 if key is None else key.shape[3]
    shape = (sequences, *log_decay.shape, 2, key_width, value.shape[3])
    return value.new_zeros(shape, dtype=log_decay.dtype)
