"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor

from supra.kernels import checks, oracle
from supra.kernels.delta import Inputs


def recurrence(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, V] and final state [N, H, K, V], both float64."""
    group = x.query.shape[2] // x.key.shape[2]
    decay = oracle.decay_by_token(x.log_decay, x.key, x.key.shape[2])[..., None, None]
    query, key, value, beta = oracle.flat(x.query, x.key, x.value, x.beta[..., None, None])

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        k, v = key[t], value[t]
        predicted = torch.einsum("hk,hkv->hv", k, memory)
        memory = memory - beta[t] * k[:, :, None] * predicted[:, None, :]
        memory = decay[t] * memory + beta[t] * k[:, :, None] * v[:, None, :]
        shared = memory.repeat_interleave(group, 0)
        return x.scale * torch.einsum("hk,hkv->hv", query[t], shared), memory

    return oracle.run(step, x.query, x.cu_seqlens, checks.given_or_zeros(x.state, x))
