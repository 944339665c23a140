"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor

from supra.kernels import checks, oracle
from supra.kernels.delta import Inputs


def recurrence(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, V] and final state [N, H, K, V], both float64."""
    group = x.query.shape[2] // x.key.shape[2]
    tensors = (x.query, x.key, x.value, x.beta[..., None], x.log_decay.double().exp())
    query, key, value, beta, decay = oracle.flat(*tensors)

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = decay[t, :, :, None] * memory
        written = beta[t] * (value[t] - torch.einsum("hk,hkv->hv", key[t], memory))
        memory = memory + torch.einsum("hk,hv->hkv", key[t], written)
        shared = memory.repeat_interleave(group, 0)
        return x.scale * torch.einsum("hk,hkv->hv", query[t], shared), memory

    return oracle.run(step, x.query, x.cu_seqlens, checks.given_or_zeros(x.state, x))
