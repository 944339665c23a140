"""The oracle of the delta rule's operations: the recurrence of their api.py, in float64."""

import torch
from torch import Tensor

from supra.kernels import checks, oracle
from supra.kernels.delta import Inputs


def recurrence(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, V] and final state [N, H, K, V], both float64.

    One decay for all channels can come before the erasure or after it: the results are the same.
    """
    heads = x.key.shape[2]
    if x.log_decay is not None and x.log_decay.dim() == 4:
        (decay,) = oracle.flat(x.log_decay.double().exp())
    else:
        decay = oracle.decay_by_token(x.log_decay, x.key, heads)[..., None]
    query, key, value, beta = oracle.flat(x.query, x.key, x.value, x.beta[..., None])

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = decay[t, :, :, None] * memory
        written = beta[t] * (value[t] - torch.einsum("hk,hkv->hv", key[t], memory))
        memory = memory + torch.einsum("hk,hv->hkv", key[t], written)
        shared = memory.repeat_interleave(x.query.shape[2] // heads, 0)
        return x.scale * torch.einsum("hk,hkv->hv", query[t], shared), memory

    return oracle.run(step, x.query, x.cu_seqlens, checks.given_or_zeros(x.state, x))
