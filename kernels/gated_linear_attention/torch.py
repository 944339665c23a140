"""Linear attention with a decay per key channel in plain torch; chunks as batched matrix products.

channel_tiles.py says how a chunk is scored.
"""

from functools import partial

import torch
from torch import Tensor

from supra.kernels import checks, chunks
from supra.kernels.channel_tiles import ChannelTiles
from supra.kernels.chunks import Block
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
    return chunks.forward(x, _Tiles)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; all that the forward pass computed is computed again."""
    d_bonus = None if x.bonus is None else torch.zeros_like(x.bonus, dtype=torch.float64)
    *found, d_state = chunks.backward(x, 4, d_output, d_end, partial(_Tiles, d_bonus=d_bonus))
    return *found, None if d_bonus is None else d_bonus.to(x.bonus.dtype), d_state


class _Tiles(ChannelTiles):
    """With the values [n, C, V], and the gradient of the bonus, which adds up over the blocks."""

    def __init__(self, x: Inputs, block: Block, keep: bool, d_bonus: Tensor | None = None):
        super().__init__(x, block, x.query, x.bonus)
        self.value, self.d_bonus = self.of_kv_heads(x.value, clear=True), d_bonus
        self.scores, self.levels = self.climb(keep)
        self.entering_query = self.entering

    def scan(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self._scan(torch.bmm(self.leaving.mT, self.value), state), self.value

    def backward(
        self, d_out: Tensor, states: Tensor, value: Tensor, d_state: Tensor
    ) -> list[Tensor]:
        d_scores, d_value = torch.bmm(d_out, value.mT), torch.bmm(self.scores.mT, d_out)
        d_states = self._scan(torch.bmm(self.entering.mT, d_out), d_state, back=True)
        d_value.baddbmm_(self.leaving, d_states)
        d_query, d_key, d_log_decay, d_bonus = self.gradients(
            self.levels, value, d_out, d_scores, states, d_states
        )
        if d_bonus is not None:
            self.d_bonus += d_bonus
        found = map(self.to_kv_heads, (d_key, d_value, d_log_decay))
        return [self.to_heads(d_query.flatten(1, 2)), *found]

    def _scan(self, steps: Tensor, state: Tensor, back: bool = False) -> Tensor:
        """state <- whole * state + step, level by level; steps are replaced by the state before."""
        walk = self.block.walk(state, steps, self.whole.mT)
        for now, step, whole in reversed(walk) if back else walk:
            after = torch.addcmul(step, now, whole)
            step.copy_(now)
            now.copy_(after)
        return steps
