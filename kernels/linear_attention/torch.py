"""Linear attention in plain torch, for any device, fast on a CPU: token by token, and in chunks.

A sequence goes block by block, see torch_blocks. Legend: a lane is one state head of one sequence;
chunks of C tokens; R query heads of a lane, which make one tile of R * C rows.
"""

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.linear_attention.inputs import Inputs
from supra.kernels.linear_attention.torch_blocks import Block, Blocks, State, split_rows, state_of


def recurrent(x: Inputs, in_place: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The recurrence of api.py, token by token: output and final state."""
    multiply, insert, add = torch.mul, torch.addcmul, torch.add
    if in_place:
        multiply, insert, add = Tensor.mul_, Tensor.addcmul_, Tensor.add_
    memory, normalizer = x.start()
    dtype, (heads, kv_heads) = memory.dtype, (memory.shape[1], x.key.shape[2])
    decay = None if x.log_decay is None else x.log_decay.to(dtype).exp()
    query, key, value = (y.to(dtype) for y in x[:3])
    query = query.unflatten(2, (heads, -1))
    if heads > kv_heads:
        key, value = (
            y[:, :, :, None].expand(-1, -1, -1, heads // kv_heads, -1).flatten(2, 3)
            for y in (key, value)
        )
    outputs = []
    for t in range(query.shape[1]):
        q, k, v = query[:, t], key[:, t], value[:, t]
        if decay is not None:
            a = (decay if decay.dim() == 1 else decay[:, t])[..., None]
            memory = multiply(memory, a[..., None])
            normalizer = None if normalizer is None else multiply(normalizer, a)
        memory = insert(memory, k[..., None], v[..., None, :])
        output = q @ memory
        if normalizer is None:
            output = output * x.scale
        else:
            normalizer = add(normalizer, k)
            output = output / (q @ normalizer[..., None] + x.eps)
        outputs.append(output.flatten(1, 2))
    output = outputs[0][:, None] if len(outputs) == 1 else torch.stack(outputs, 1)
    return output.to(x.value.dtype), memory, normalizer


def forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same function in chunks."""
    output, *empty, weights = x.empty_results()
    memory, normalizer = map(checks.copy_or_zeros, (x.memory, x.normalizer), empty)
    for group in split_rows(x):
        state = state_of(group, memory, normalizer)
        blocks = Blocks(group, x, state[0])
        outputs = blocks.split(output)
        weighed = blocks.split(weights[..., None]) if x.normalized else None
        for i, block in enumerate(blocks):
            s, z = block.states(*state)
            scores = block.scores()
            out = block.weigh(torch.bmm(block.query, s), block.entering)
            out.baddbmm_(scores, block.value)
            if x.normalized:
                weight = block.weigh(torch.bmm(block.query, z[..., None]), block.entering)
                weight += scores.sum(-1, keepdim=True)
                block.write(weighed[i], weight)
                out /= weight + x.eps
            elif x.scale != 1:
                out *= x.scale
            block.write(outputs[i], out)
    return output, memory, normalizer, weights


def backward(
    x: Inputs,
    d_output: Tensor,
    d_memory: Tensor | None,
    d_normalizer: Tensor | None,
    output: Tensor,
    weights: Tensor,
) -> tuple[Tensor | None, ...]:
    """States and scores are computed again, a span of chunks at a time."""
    _, *empty, _ = x.empty_results()
    pairs = (x.memory, x.normalizer), (d_memory, d_normalizer)
    start, d_state = (tuple(map(checks.copy_or_zeros, states, empty)) for states in pairs)
    d_inputs = [y.new_empty(y.shape) for y in x[:3]]
    d_decays = start[0].new_empty(*x.query.shape[:2], x.state_heads, 1)
    if x.log_decay is not None:
        d_inputs.append(d_decays)
    given = (d_output, output, weights[..., None]) if x.normalized else (d_output,)
    for group in split_rows(x):
        state, d_end = (state_of(group, *states) for states in (start, d_state))
        _group_backward(Blocks(group, x, state[0]), x, state, d_end, given, d_inputs)

    d_log_decay = checks.d_log_decay(x.log_decay, d_decays[..., 0])
    d_memory = None if x.memory is None else d_state[0]
    return *d_inputs[:3], d_log_decay, d_memory, None if x.normalizer is None else d_state[1]


def _group_backward(
    blocks: Blocks,
    x: Inputs,
    state: State,
    d_end: State,
    given: tuple[Tensor, ...],
    d_inputs: list[Tensor],
) -> None:
    """Write the gradients of a group's inputs into d_inputs; d_end becomes that of its state.

    given: d_output and, when normalized, output and weights.
    """
    states = [block.states(*state) for block in blocks]
    given = list(zip(*map(blocks.split, given), strict=True))
    found = list(zip(*map(blocks.split, d_inputs), strict=True))
    for i in reversed(range(len(states))):
        block = blocks[i]
        do, delta = _output_gradient(block, *given[i], scale=x.scale, eps=x.eps)
        gradients = _block_gradients(block, do, delta, *states.pop(), *d_end)
        for out, gradient in zip(found[i], gradients, strict=True):
            block.write(out, gradient)


def _output_gradient(
    block: Block,
    d_output: Tensor,
    output: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the undivided output [tiles, R * C, V] and of the weights [tiles, R * C, 1]."""
    do = block.tile(d_output)
    if weights is None:
        return do.mul_(scale) if scale != 1 else do, None
    inverse = (block.tile(weights) + eps).reciprocal_()
    delta = (do * block.tile(output)).sum(-1, keepdim=True).mul_(inverse).neg_()
    return do.mul_(inverse), delta


def _block_gradients(
    block: Block,
    do: Tensor,
    delta: Tensor | None,
    s: Tensor,
    z: Tensor | None,
    d_end: Tensor,
    d_end_z: Tensor | None,
) -> tuple[Tensor, ...]:
    """dq, dk, dv and, where there is decay, d_log_decay of one block.

    s and z: what block.states() gave. d_end and d_end_z go from the gradient of the state after the
    block to that before it, in place. The gradient of a running sum of logs is q . dq of its row
    less k . dk of its column; that of a chunk's last one has <state, its gradient> added.
    """
    q, k, v, entering, leaving = (
        block.query, block.key, block.value, block.entering, block.leaving
    )  # fmt: skip
    d_entering = do if entering is None else block.weigh(do.clone(), entering)
    ds = block.scan(torch.bmm(q.mT, d_entering), d_end, back=True)
    d_scores = torch.bmm(do, v.mT)
    if delta is not None:
        d_scores += delta
    block.decay_pairs(d_scores)
    dq = torch.bmm(d_entering, s.mT).baddbmm_(d_scores, k)
    dv = block.weigh(torch.bmm(k, ds), leaving).baddbmm_(block.scores().mT, do)
    dk = torch.bmm(v, ds.mT)
    if delta is not None:
        delta = block.weigh(delta, entering)
        dz = block.scan(torch.bmm(q.mT, delta)[..., 0], d_end_z, back=True)
        dq.addcmul_(delta, z[:, None])
        dk += dz[:, None]
    if entering is None:
        return dq, dk.baddbmm_(d_scores.mT, q), dv
    block.weigh(dk, leaving)
    last = (k * dk).sum((1, 2)) + (s * ds).sum((1, 2)) * block.whole[:, 0, 0]
    if delta is not None:
        last += (z * dz).sum(1) * block.whole[:, 0, 0]
    dk.baddbmm_(d_scores.mT, q)
    d_sums = (q * dq).sum(-1).view(len(k), -1, k.shape[1]).sum(1) - (k * dk).sum(-1)
    d_sums[:, -1] += last
    d_log_decay = d_sums.flip(-1).cumsum(-1).flip(-1)[..., None]
    return dq, dk, dv, d_log_decay
