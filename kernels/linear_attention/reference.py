"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor

from supra.kernels import checks, oracle
from supra.kernels.linear_attention.inputs import Inputs


def recurrence(x: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output [B, T, Hq, V], final memory and normalizer, all float64."""
    heads = x.query.shape[2]
    decay = oracle.decay_by_token(x.log_decay, x.query, x.state_heads)
    query, key, value = oracle.flat(x.query, x.key, x.value)

    def per_head(part: Tensor, heads: int) -> Tensor:
        return part.repeat_interleave(heads // part.shape[0], 0)

    def step(t: int, memory: Tensor, normalizer: Tensor | None = None) -> tuple[Tensor, ...]:
        k, v = per_head(key[t], x.state_heads), per_head(value[t], x.state_heads)
        memory = decay[t, :, None, None] * memory + k[:, :, None] * v[:, None, :]
        output = torch.einsum("hk,hkv->hv", query[t], per_head(memory, heads))
        if normalizer is None:
            return x.scale * output, memory
        normalizer = decay[t, :, None] * normalizer + k
        weight = (query[t] * per_head(normalizer, heads)).sum(-1, keepdim=True)
        return output / (weight + x.eps), memory, normalizer

    found = oracle.run(step, x.query, x.cu_seqlens, *checks.present(*x.start()))
    return found if x.normalized else (*found, None)
