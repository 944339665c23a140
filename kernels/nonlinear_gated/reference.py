"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor

from supra.kernels import checks, oracle
from supra.kernels.nonlinear_gated.inputs import Inputs


def recurrence(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and final state, all float64; there is nothing to sweep."""
    weight = x.weight.double()
    query, key, value, logs = oracle.flat(*x[:3], x.log_decay[..., None, None])
    keep, write = logs.exp(), -torch.expm1(logs)

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        written = key[t, :, :, None] * value[t, :, None, :]
        memory = keep[t] * memory + write[t] * (weight * memory + written).tanh()
        return x.scale * torch.einsum("hk,hkv->hv", query[t], memory), memory

    return oracle.run(step, x.query, x.cu_seqlens, checks.given_or_zeros(x.state, x))
