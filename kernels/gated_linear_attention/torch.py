"""Linear attention with a decay per key channel in plain torch; chunks as batched matrix products.

channel_tiles.py says how a chunk is scored. States are kept transposed, [N, H, V, K].
"""

import torch
from torch import Tensor

from supra.kernels import checks
from supra.kernels.channel_tiles import ChannelTiles
from supra.kernels.chunks import Block, Layout, contiguous
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
    layout, output = Layout.of(x), x.empty_results()[0]
    x, state = contiguous(x), _start(x, layout, x.state)
    for block in layout.blocks:
        tiles = _Tiles(x, block)
        scores, _ = tiles.climb()
        states = tiles.states(state)
        out = torch.bmm(tiles.entering, states.mT)
        out.baddbmm_(scores, tiles.value, beta=x.scale, alpha=x.scale)
        block.scatter(tiles.to_heads(out), output)
    return output, layout.unrank(state.mT)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; all that the forward pass computed is computed again."""
    layout, given = Layout.of(x), x[:4]
    gradients = [torch.empty_like(y, memory_format=torch.contiguous_format) for y in given]
    d_bonus = None if x.bonus is None else torch.zeros_like(x.bonus, dtype=torch.float64)
    x, d_output = contiguous(x), d_output.contiguous()
    state, d_state = (_start(x, layout, y) for y in (x.state, d_end))
    visited = []
    for block in layout.blocks:
        tiles = _Tiles(x, block)
        scores, levels = tiles.climb(keep=True)
        visited.append((tiles, scores, levels, tiles.states(state)))
    while visited:
        tiles, scores, levels, states = visited.pop()
        d_out = tiles.of_heads(d_output, clear=True).mul_(x.scale)
        d_scores, d_value = torch.bmm(d_out, tiles.value.mT), torch.bmm(scores.mT, d_out)
        d_states = tiles.scan(torch.bmm(d_out.mT, tiles.entering), d_state, back=True)
        d_value.baddbmm_(tiles.leaving, d_states.mT)
        d_query, d_key, d_log_decay, d_own = tiles.gradients(
            levels, tiles.value, d_out, d_scores, states, d_states
        )
        if d_own is not None:
            d_bonus += d_own
        found = map(tiles.to_kv_heads, (d_key, d_value, d_log_decay))
        for gradient, tile in zip(
            gradients, (tiles.to_heads(d_query.flatten(1, 2)), *found), strict=True
        ):
            tiles.block.scatter(tile, gradient)
    return (
        *gradients,
        None if d_bonus is None else d_bonus.to(x.bonus.dtype),
        None if x.state is None else layout.unrank(d_state.mT).to(x.state.dtype),
    )


def _start(x: Inputs, layout: Layout, state: Tensor | None) -> Tensor:
    """The state, or zeros, as [N * Hkv, V, K] in the order of ranks."""
    return layout.rank(checks.given_or_zeros(state, x)).mT.contiguous()


class _Tiles(ChannelTiles):
    """With the values [n, C, V]."""

    def __init__(self, x: Inputs, block: Block):
        super().__init__(x, block, x.query, x.bonus)
        self.value = self.of_kv_heads(x.value, clear=True)

    def states(self, state: Tensor) -> Tensor:
        """States before every chunk, [n, V, K]; state is taken through the chunks."""
        return self.scan(torch.bmm(self.value.mT, self.leaving), state)

    def scan(self, steps: Tensor, state: Tensor, back: bool = False) -> Tensor:
        """state <- whole * state + step, level by level; steps are replaced by the state before.

        state: [N * Hkv, V, K] in the order of ranks.
        """
        walk = self.block.walk(state, steps, self.whole)
        for now, step, whole in reversed(walk) if back else walk:
            after = torch.addcmul(step, now, whole)
            step.copy_(now)
            now.copy_(after)
        return steps
