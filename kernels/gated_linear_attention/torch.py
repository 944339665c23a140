"""Linear attention with a decay per key channel in plain torch; chunks as batched matrix products.

channel_tiles.py says how a chunk is scored. States are kept transposed, [N, H, V, K].
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.channel_tiles import ChannelTiles
from supra.kernels.gated_linear_attention.inputs import Inputs


def recurrent(x: Inputs, in_place: bool) -> tuple[Tensor, Tensor]:
    """The recurrence of api.py, token by token: output and final state."""
    memory = checks.given_or_zeros(x.state, x)
    dtype, kv_heads = memory.dtype, x.key.shape[2]
    query = x.query.to(dtype).unflatten(2, (kv_heads, -1)) * x.scale
    key, value, decay = x.key.to(dtype), x.value.to(dtype), x.log_decay.to(dtype).exp()
    if x.bonus is not None:  # what the token itself adds: its score times its value
        own = query * x.bonus.to(dtype).unflatten(0, (kv_heads, -1))
        own = (own @ key[..., None]) * value[..., None, :]
    outputs = []
    for t in range(query.shape[1]):
        k, v, before = key[:, t, ..., None], value[:, t, :, None], memory
        memory = torch.addcmul(before * decay[:, t, ..., None], k, v)
        read = query[:, t] @ memory if x.bonus is None else own[:, t] + query[:, t] @ before
        outputs.append(read.flatten(1, 2))
    memory = x.state.copy_(memory) if in_place else memory
    return torch.stack(outputs, 1).to(x.value.dtype), memory


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """The same function in chunks."""
    tiles = _Tiles(x)
    scores, _ = tiles.climb()
    states, end = tiles.states(x.state)
    out = torch.bmm(tiles.entering, states.flatten(0, 1).mT).baddbmm_(scores, tiles.value)
    output = tiles.to_heads(out if x.scale == 1 else out.mul_(x.scale), x.query)
    return output.to(x.value.dtype), end[tiles.layout.place].mT.contiguous()


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; all that the forward pass computed is computed again."""
    tiles = _Tiles(x)
    scores, levels = tiles.climb(keep=True)
    states, _ = tiles.states(x.state)
    d_out = tiles.of_heads(d_output, clear=True)
    d_out = d_out if x.scale == 1 else d_out.mul_(x.scale)

    d_scores, d_value = torch.bmm(d_out, tiles.value.mT), torch.bmm(scores.mT, d_out)
    steps = torch.bmm(d_out.mT, tiles.entering).view_as(states)
    d_states, d_start = tiles.scan(steps, d_end, reversed(tiles.layout.levels))
    states, d_states = states.flatten(0, 1), d_states.flatten(0, 1)
    d_value.baddbmm_(tiles.leaving, d_states.mT)
    d_query, d_key, d_log_decay, d_bonus = tiles.gradients(
        levels, tiles.value, d_out, d_scores, states, d_states
    )
    return (
        tiles.to_heads(d_query.flatten(1, 2), x.query).to(x.query.dtype),
        tiles.to_kv_heads(d_key, x.key).to(x.key.dtype),
        tiles.to_kv_heads(d_value, x.key).to(x.value.dtype),
        tiles.to_kv_heads(d_log_decay, x.key).to(x.log_decay.dtype),
        None if x.bonus is None else d_bonus.to(x.bonus.dtype),
        None if x.state is None else d_start[tiles.layout.place].mT.to(x.state.dtype),
    )


class _Tiles(ChannelTiles):
    """With the values [n, C, V]."""

    def __init__(self, x: Inputs):
        super().__init__(x, x.query, x.bonus)
        self.value = self.of_kv_heads(x.value, clear=True)

    def states(self, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """States before every chunk, [chunks, Hkv, V, K], and after the last of every sequence."""
        steps = torch.bmm(self.value.mT, self.leaving).unflatten(0, (-1, self.kv_heads))
        return self.scan(steps, start, self.layout.levels)

    def scan(
        self, steps: Tensor, state: Tensor | None, levels: Iterable[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """state <- whole * state + step, level by level; steps are replaced by the state before.

        state [N, H, K, V] or None for zeros; the last one comes back transposed and in the order of
        the layout.
        """
        if state is None:
            state = steps.new_zeros(len(self.layout.order), *steps.shape[1:])
        else:
            state = state.to(steps.dtype).mT[self.layout.order].contiguous()
        whole = self.whole.unflatten(0, (-1, self.kv_heads))
        for begin, end in levels:
            before, step = state[: end - begin], steps[begin:end]
            after = torch.addcmul(step, before, whole[begin:end])
            step.copy_(before)
            before.copy_(after)
        return steps, state
