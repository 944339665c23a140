"""The convolution in plain torch: products with small Toeplitz matrices, and a state a chunk.

The outer products k_t v_t^T are K * V columns of numbers over time, all filtered by the model of
their head. So a head is one matrix, its rows the chunks of all columns and sequences, and a chunk
of n tokens costs three products: of its inputs with the Toeplitz matrix of the taps, of its inputs
with what makes them a state, and of the state that it enters with, with what reads it.
"""

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.long_conv.inputs import Inputs
from supra.kernels.long_conv.modes import polar, wide
from supra.kernels.long_conv.torch_blocks import (
    Filters,
    lanes_of,
    split_blocks,
    split_rows,
    state_of,
)


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and final state."""
    filters = Filters(x.model, min(x.chunk_size, x.value.shape[1]))
    output, end = x.empty_results()
    end, columns = checks.copy_or_zeros(x.state, end), end[0, :, 0, 0].numel()
    for group in split_rows(x, columns, filters.size):
        memory = lanes_of(end[group.states])
        for block in split_blocks(group, filters, columns):
            found, memory = block.convolve(block.outer(x.key, x.value), memory)
            block.contract(found, x.query, 2, output)
        end[group.states] = state_of(memory)
    return output, end


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; the states are computed again."""
    filters = Filters(x.model, min(x.chunk_size, x.value.shape[1]))
    first = checks.given_or_zeros(x.state, x)
    d_state = checks.copy_or_zeros(d_end, first)
    columns = first[0, :, 0, 0].numel()
    d_query, d_key, d_value = (None if y is None else y.new_empty(y.shape) for y in x[:3])
    for group in split_rows(x, columns, filters.size):
        memory, d_memory = lanes_of(first[group.states]), lanes_of(d_state[group.states])
        blocks, before = list(split_blocks(group, filters, columns)), []
        for block in blocks:
            before.append(memory)
            if block is not blocks[-1]:
                _, memory = block.states(block.outer(x.key, x.value), memory)
        for block in reversed(blocks):
            inputs, d_found = block.outer(x.key, x.value), block.outer(x.query, d_output)
            states, _ = block.states(inputs, before.pop())
            if x.query is not None:
                block.contract(block.read(inputs, states), d_output, 3, d_query)
            d_inputs, d_memory = block.d_convolve(inputs, states, d_found, d_memory)
            if x.key is not None:
                block.contract(d_inputs, x.value, 3, d_key)
            block.contract(d_inputs, x.key, 2, d_value)
        d_state[group.states] = state_of(d_memory)
    return d_query, d_key, d_value, *filters.gradients(), None if x.state is None else d_state


def recurrent(x: Inputs, in_place: bool) -> tuple[Tensor, Tensor]:
    """The recurrence of api.py, token by token: output and final state."""
    dtype, state = x.log_decay.dtype, checks.given_or_zeros(x.state, x)
    # in real numbers, which a step needs to be exported
    sizes, angles = polar(x.model, 1)
    keep, turn = sizes * angles.cos(), sizes * angles.sin()
    keep, turn = keep[..., None, None, None], torch.stack((-turn, turn), -1)[..., None, None]
    read = 2 * torch.stack((x.weight[..., 0], -x.weight[..., 1]), -1).flatten(1)[:, None]
    outputs = []
    for t in range(x.value.shape[1]):
        new = x.value[:, t, :, None].to(dtype)
        if x.key is not None:
            new = x.key[:, t, :, :, None].to(dtype) * new
        before = wide(state)
        after = torch.addcmul(before * keep, before.flip(3), turn)
        after[:, :, :, 0] += new[:, :, None]
        state = state.copy_(after) if in_place else after.to(dtype)
        seen = torch.matmul(read, state.flatten(4).flatten(2, 3)).view(new.shape)
        if x.skip is not None:
            seen = seen + x.skip[:, None, None] * new
        if x.query is not None:
            seen = x.query[:, t, :, :, None].to(dtype) * seen
        outputs.append(seen.sum(2).to(x.value.dtype))
    return torch.stack(outputs, 1), state
