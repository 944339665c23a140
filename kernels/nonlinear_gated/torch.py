"""Any device: the recurrence token by token, few operations a token, and its gradients by hand.

Newton's method over many tokens at once would take the tanh of every number several times. What a
token needs stays in the cache: of 2 rows, 9 heads and 64 channels a tensor is 300 KB. States are
kept every `chunk_size` tokens; the backward pass runs through a chunk again, then back through it.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.packing import count_chunks


class _Run(NamedTuple):
    """Sequences that go through their tokens together.

    first, step: of the slots of their states before their first chunk; the next chunk's are next.
    """

    sequences: slice
    tokens: slice
    first: int
    step: int

    def slots(self, kept: Tensor, chunk: int) -> Tensor:
        """[B, H, K, V], the states before a chunk."""
        return kept[self.first + chunk :: self.step]

    def tensors(self, *tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """[B, T, H, ...] of its tokens as [T, B, H, ...]."""
        return [x[:, self.tokens].transpose(0, 1).to(dtype).contiguous() for x in tensors]


def chunk_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    sweeps: int,
    tolerance: float,
    chunk_size: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results are those of operator.forward; there is nothing to sweep."""
    dtype = checks.state_dtype(query, key, value)
    shape = (checks.sequences(query, cu_seqlens), *weight.shape)
    end = query.new_zeros(shape, dtype=dtype)
    if state is not None:
        end.copy_(state)
    room = count_chunks(query, cu_seqlens, chunk_size) if save_states else 0
    kept = end.new_zeros(room, *weight.shape)  # of packed sequences some are spare
    output, weight = value.new_empty(value.shape), weight.to(dtype)
    for run in _runs(query, cu_seqlens, chunk_size):
        q, k, v, g = run.tensors(query, key, value, log_decay, dtype=dtype)
        q, k, v = q[..., None, :], k[..., None], v[..., None, :]
        write = -torch.expm1(g)[..., None, None]
        memory, found = end[run.sequences], torch.empty_like(v)
        new = torch.empty_like(memory)
        for t in range(len(q)):
            if save_states and t % chunk_size == 0:
                run.slots(kept, t // chunk_size).copy_(memory)
            _advance(memory, k[t], v[t], write[t], weight, new=new, after=memory)
            torch.matmul(q[t], memory, out=found[t])
        output[:, run.tokens] = (found.squeeze(3) * scale).transpose(0, 1)
    return output, end, kept, end.new_zeros(2, *shape[:2])


def chunk_backward(
    d_output: Tensor,
    d_end: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    *,
    scale: float,
    sweeps: int,
    tolerance: float,
    chunk_size: int,
) -> tuple[Tensor | None, ...]:
    """Arguments and results are those of operator.backward."""
    dtype, inputs = states.dtype, (query, key, value, log_decay)
    shape = (checks.sequences(query, cu_seqlens), *weight.shape)
    d_state = states.new_zeros(shape) if d_end is None else d_end.clone()
    d_weight = states.new_zeros(shape)
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    for run in _runs(query, cu_seqlens, chunk_size):
        q, k, v, g, d = run.tensors(*inputs, d_output, dtype=dtype)
        tokens = (q[..., None], k[..., None], v[..., None, :], (d * scale)[..., None, :])
        tokens = (*tokens, g.exp()[..., None, None], -torch.expm1(g)[..., None, None])
        found = [torch.empty_like(x) for x in (*tokens[:3], g[..., None, None])]
        totals = d_state[run.sequences], d_weight[run.sequences]
        room = states.new_empty(2, chunk_size + 1, *totals[0].shape)
        for chunk in reversed(range(-(-len(q) // chunk_size))):
            some = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
            room[0, 0] = run.slots(states, chunk)
            here = [[x[some] for x in xs] for xs in (tokens, found)]
            _chunk_backward(*here, weight.to(dtype), *totals, *room)
        for x, result in zip(gradients, found, strict=True):
            x[:, run.tokens] = result.transpose(0, 1).reshape(x[:, run.tokens].shape)
    return (
        *gradients,
        d_weight.sum(0).to(weight.dtype),
        None if state is None else d_state.to(state.dtype),
    )


def _chunk_backward(
    tokens: list[Tensor],
    gradients: list[Tensor],
    weight: Tensor,
    d_state: Tensor,
    d_weight: Tensor,
    states: Tensor,
    new: Tensor,
) -> None:
    """Fill the gradients of query, key, value and log_decay of one chunk.

    d_state: the gradient of the state after the chunk, which becomes that of the state before it.
    d_weight: what the gradient of the weight is added to. states, new: room for the states, the one
    before the chunk first, and for their tanh.
    """
    query, key, value, d_output, keep, write = tokens
    d_query, d_key, d_value, d_log_decay = gradients
    for t in range(len(key)):
        _advance(states[t], key[t], value[t], write[t], weight, new=new[t], after=states[t + 1])
    gap, bent = new[-1], torch.empty_like(d_state)
    for t in reversed(range(len(key))):
        torch.matmul(states[t + 1], d_output[t].mT, out=d_query[t])
        d_state.addcmul_(query[t], d_output[t])
        torch.sub(states[t], new[t], out=gap).mul_(d_state)
        torch.sum(gap, (-2, -1), keepdim=True, out=d_log_decay[t])
        torch.ops.aten.tanh_backward.grad_input(d_state, new[t], grad_input=bent).mul_(write[t])
        torch.matmul(bent, value[t].mT, out=d_key[t])
        torch.matmul(key[t].mT, bent, out=d_value[t])
        d_weight.addcmul_(bent, states[t])
        d_state.mul_(keep[t]).addcmul_(bent, weight)
    d_log_decay *= keep


def _advance(
    state: Tensor,
    key: Tensor,
    value: Tensor,
    write: Tensor,
    weight: Tensor,
    *,
    new: Tensor,
    after: Tensor,
) -> None:
    """One token's tanh to `new` and its state to `after`, which may be `state`."""
    torch.mul(key, value, out=new).addcmul_(weight, state).tanh_()
    torch.lerp(state, new, write, out=after)


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor | None,
    *,
    scale: float,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """Output and final state of the recurrence token by token."""
    dtype = checks.state_dtype(query, key, value)
    if state is None:
        state = query.new_zeros(query.shape[0], *weight.shape, dtype=dtype)
    given, weight, outputs = state, weight.to(dtype), []
    q, k, v, g = (x.to(dtype).unbind(1) for x in (query, key, value, log_decay))
    for t in range(query.shape[1]):
        new = (weight * state + k[t][..., None] * v[t][..., None, :]).tanh()
        state = torch.lerp(state, new, -torch.expm1(g[t])[..., None, None])
        outputs.append((q[t][..., None, :] @ state).squeeze(-2) * scale)
    output = torch.stack(outputs, dim=1).to(value.dtype)
    return output, given.copy_(state) if in_place else state


def _runs(query: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Iterator[_Run]:
    batch, length = query.shape[:2]
    bounds = checks.bounds(cu_seqlens, batch, length)
    room = count_chunks(query, cu_seqlens, chunk_size)
    if cu_seqlens is None:
        yield _Run(slice(0, batch), slice(0, length), 0, room // batch)
        return
    first = 0
    for n, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            yield _Run(slice(n, n + 1), slice(begin, end), first, room)
        first += -(-(end - begin) // chunk_size)
