"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor

from supra.kernels import checks, oracle
from supra.kernels.gated_linear_attention.inputs import Inputs


def recurrence(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, V] and final state, all float64."""
    group = x.query.shape[2] // x.key.shape[2]
    state = checks.given_or_zeros(x.state, x)
    query, key, value, decay = oracle.flat(x.query, x.key, x.value, x.log_decay.double().exp())

    def read(q: Tensor, memory: Tensor) -> Tensor:
        return x.scale * torch.einsum("hk,hkv->hv", q, memory.repeat_interleave(group, 0))

    def step(t: int, before: Tensor) -> tuple[Tensor, Tensor]:
        new = key[t, :, :, None] * value[t, :, None, :]
        memory = decay[t, :, :, None] * before + new
        if x.bonus is None:
            return read(query[t], memory), memory
        return read(query[t], before) + read(query[t] * x.bonus.double(), new), memory

    return oracle.run(step, x.query, x.cu_seqlens, state)
