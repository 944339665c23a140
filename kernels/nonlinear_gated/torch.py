"""Any device: the recurrence token by token, few operations a token, and its gradients by hand.

Newton's method over many tokens at once would take the tanh of every number several times. What a
token needs stays in the cache: of 2 rows, 9 heads and 64 channels a tensor is 300 KB. States are
kept every `chunk_size` tokens; the backward pass runs through a chunk again, then back through it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.chunks import count_chunks, split_groups
from supra.kernels.nonlinear_gated.inputs import Inputs


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


def forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final state, kept states, and zeros: there is nothing to sweep."""
    output, end, kept, solved = (torch.zeros_like(y) for y in x.empty_results())
    if x.state is not None:
        end.copy_(x.state)
    weight = x.weight.to(end.dtype)
    for run in _runs(x):
        q, k, v, g = run.tensors(*x[:4], dtype=end.dtype)
        q, k, v = q[..., None, :], k[..., None], v[..., None, :]
        write = -torch.expm1(g)[..., None, None]
        memory, found = end[run.sequences], torch.empty_like(v)
        new = torch.empty_like(memory)
        for t in range(len(q)):
            if x.save_states and t % x.chunk_size == 0:
                run.slots(kept, t // x.chunk_size).copy_(memory)
            _advance(memory, k[t], v[t], write[t], weight, new=new, after=memory)
            torch.matmul(q[t], memory, out=found[t])
        output[:, run.tokens] = (found.squeeze(3) * x.scale).transpose(0, 1)
    return output, end, kept, solved


def backward(
    x: Inputs, d_output: Tensor, d_end: Tensor | None, states: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors, from the states before every chunk."""
    size, dtype, inputs = x.chunk_size, states.dtype, x[:4]
    d_weight = torch.zeros_like(x.empty_results()[1])
    d_state = torch.zeros_like(d_weight) if d_end is None else d_end.clone()
    gradients = [torch.empty_like(y, memory_format=torch.contiguous_format) for y in inputs]
    for run in _runs(x):
        q, k, v, g, d = run.tensors(*inputs, d_output, dtype=dtype)
        tokens = (q[..., None], k[..., None], v[..., None, :], (d * x.scale)[..., None, :])
        tokens = (*tokens, g.exp()[..., None, None], -torch.expm1(g)[..., None, None])
        found = [torch.empty_like(y) for y in (*tokens[:3], g[..., None, None])]
        totals = d_state[run.sequences], d_weight[run.sequences]
        room = states.new_empty(2, size + 1, *totals[0].shape)
        for chunk in reversed(range(-(-len(q) // size))):
            some = slice(chunk * size, (chunk + 1) * size)
            room[0, 0] = run.slots(states, chunk)
            here = [[y[some] for y in ys] for ys in (tokens, found)]
            _chunk_backward(*here, x.weight.to(dtype), *totals, *room)
        for y, result in zip(gradients, found, strict=True):
            y[:, run.tokens] = result.transpose(0, 1).reshape(y[:, run.tokens].shape)
    return (
        *gradients,
        d_weight.sum(0).to(x.weight.dtype),
        None if x.state is None else d_state.to(x.state.dtype),
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


def recurrent(x: Inputs, in_place: bool) -> tuple[Tensor, Tensor]:
    """Output and final state of the recurrence token by token."""
    state = checks.given_or_zeros(x.state, x)
    dtype, outputs = state.dtype, []
    weight = x.weight.to(dtype)
    q, k, v, g = (y.to(dtype).unbind(1) for y in x[:4])
    for t in range(len(q)):
        new = (weight * state + k[t][..., None] * v[t][..., None, :]).tanh()
        state = torch.lerp(state, new, -torch.expm1(g[t])[..., None, None])
        outputs.append((q[t][..., None, :] @ state).squeeze(-2) * x.scale)
    output = torch.stack(outputs, dim=1).to(x.value.dtype)
    return output, x.state.copy_(state) if in_place else state


def _runs(x: Inputs) -> Iterator[_Run]:
    batch, first = len(x.query), 0
    step = count_chunks(x.query, x.cu_seqlens, x.chunk_size) // batch
    for group in split_groups(x.query, x.cu_seqlens, batch):
        yield _Run(group.states, slice(group.begin, group.end), first, step)
        first += -(-(group.end - group.begin) // x.chunk_size)
