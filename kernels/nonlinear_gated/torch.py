"""Any device: the recurrence token by token, few operations a token, and its gradients by hand.

Newton's method over many tokens at once would take the tanh of every number several times. What a
token needs stays in the cache: of 2 rows, 9 heads and 64 channels a tensor is 300 KB. States are
kept every `chunk_size` tokens; the backward pass runs through a chunk again, then back through it.
"""

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.chunks import Layout, contiguous
from supra.kernels.nonlinear_gated.inputs import Inputs

# Numbers in the states of packed sequences that go together, at the most; then calls cost little
TOGETHER = 1 << 17
MOST_TOKENS = 1024  # of a block where no states are kept


def forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final state, kept states, and zeros: there is nothing to sweep."""
    output, _, kept, solved = (torch.zeros_like(y) for y in x.empty_results())
    layout, x = _layout(x)
    memory, slots = checks.given_or_zeros(x.state, x)[layout.order], 0
    weight = x.weight.to(memory.dtype)
    for block in layout.blocks:
        query, key, value, logs = (block.gather(y).to(memory.dtype) for y in x[:4])
        if x.save_states:
            before = memory[block.ranks[0]]
            kept[slots : slots + len(before)] = before
            slots += len(before)
        found, room = torch.empty_like(value), torch.empty_like(memory[block.ranks[0]])
        count = len(room)
        for state, q, k, v, write, out in block.walk(
            memory, query, key.mT, value, -torch.expm1(logs), found
        ):
            new = room if k.shape[0] == count else room[: k.shape[0]]
            _advance(state, k, v, write, weight, new=new, after=state)
            torch.matmul(q, state, out=out)
        block.scatter(found.mul_(x.scale), output)
    return output, memory[layout.place], kept, solved


def backward(
    x: Inputs, d_output: Tensor, d_end: Tensor | None, states: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors, from the states before every chunk."""
    gradients = [torch.empty_like(y, memory_format=torch.contiguous_format) for y in x[:4]]
    (layout, x), d_output = _layout(x), d_output.contiguous()
    d_state = checks.given_or_zeros(d_end, x)[layout.order]
    d_weight, weight = torch.zeros_like(d_state), x.weight.to(states.dtype)
    counts = [block.ranks[0].stop - block.ranks[0].start for block in layout.blocks]
    most, slots = max(len(block.ranks) for block in layout.blocks), sum(counts)
    room = states.new_empty(2, most + 1, max(counts), *weight.shape)
    for block, count in reversed(list(zip(layout.blocks, counts, strict=True))):
        query, key, value, logs, d = (block.gather(y).to(states.dtype) for y in (*x[:4], d_output))
        given = (query.mT, key.mT, value, d.mul_(x.scale), logs.exp(), -torch.expm1(logs))
        found = [torch.empty_like(y) for y in (*given[:3], logs)]
        slots -= count
        room[0, 0, :count] = states[slots : slots + count]
        tokens = block.walk(d_state, *given, *found)
        _chunk_backward(tokens, d_weight[block.ranks[0]], weight, *room)
        found[3] *= given[4]
        for y, gradient in zip(found, gradients, strict=True):
            block.scatter(y.view(*y.shape[:2], 1, -1), gradient.view(*gradient.shape[:3], -1))
    return (
        *gradients,
        d_weight.sum(0).to(x.weight.dtype),
        None if x.state is None else d_state[layout.place].to(x.state.dtype),
    )


def _layout(x: Inputs) -> tuple[Layout, Inputs]:
    """How sequences go through their tokens, and inputs for Block.gather()."""
    x = contiguous(x._replace(log_decay=x.log_decay[..., None]))
    size, together = x.chunk_size if x.save_states else MOST_TOKENS, TOGETHER // x.weight.numel()
    return Layout.of(x._replace(chunk_size=size), max(len(x.query), together)), x


def _chunk_backward(
    tokens: list[tuple[Tensor, ...]], d_weight: Tensor, weight: Tensor, states: Tensor, new: Tensor
) -> None:
    """Fill the gradients of query, key, value and log_decay, but for its decay, of one chunk.

    tokens: for each the gradient of the state after the chunk, which becomes that of the state
    before it, what it was given, and room for its gradients. d_weight: what the gradient of the
    weight is added to. states, new: room for the states, the one before the chunk first, and for
    their tanh.
    """
    room, views = torch.empty_like(new[0]), {}  # few views: they cost as much as work
    for n in {len(d_state) for d_state, *_ in tokens}:
        views[n] = states[:, :n].unbind(), new[:, :n].unbind(), room[:n], d_weight[:n]
    for t, (now, _, key, value, _, _, write, *_) in enumerate(tokens):
        kept, bends, _, _ = views[now.shape[0]]
        _advance(kept[t], key, value, write, weight, new=bends[t], after=kept[t + 1])
    for t in reversed(range(len(tokens))):
        d_state, query, key, value, d_output, keep, write, *found = tokens[t]
        d_query, d_key, d_value, d_log_decay = found
        kept, bends, bent, total = views[d_state.shape[0]]
        before, after, bend, gap = kept[t], kept[t + 1], bends[t], bends[-1]
        torch.matmul(after, d_output.mT, out=d_query)
        d_state.addcmul_(query, d_output)
        torch.sub(before, bend, out=gap).mul_(d_state)
        torch.sum(gap, (-2, -1), keepdim=True, out=d_log_decay)
        torch.ops.aten.tanh_backward.grad_input(d_state, bend, grad_input=bent).mul_(write)
        torch.matmul(bent, value.mT, out=d_key)
        torch.matmul(key.mT, bent, out=d_value)
        total.addcmul_(bent, before)
        d_state.mul_(keep).addcmul_(bent, weight)


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
    for q, k, v, g in zip(*(y.to(dtype).unbind(1) for y in x[:4]), strict=True):
        new = (weight * state + k[..., None] * v[..., None, :]).tanh()
        state = torch.lerp(state, new, -torch.expm1(g)[..., None, None])
        outputs.append((q[..., None, :] @ state).squeeze(-2) * x.scale)
    output = torch.stack(outputs, dim=1).to(x.value.dtype)
    return output, x.state.copy_(state) if in_place else state
