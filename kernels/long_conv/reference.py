"""The oracle: the recurrence as it is written in api.py, one token after the other, in float64."""

import torch
from torch import Tensor

from supra.kernels import checks, oracle
from supra.kernels.long_conv.inputs import Inputs


def recurrence(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] and final state [N, H, M, 2, K, V], both float64."""
    gate = x.value.new_ones(*x.value.shape[:3], 1)
    query, key, value = oracle.flat(*(gate if y is None else y for y in x[:3]))
    decay = torch.polar(x.log_decay.double().exp(), x.frequency.double())[..., None, None]
    weight = torch.view_as_complex(x.weight.double().contiguous())[..., None, None]

    def step(t: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.view_as_complex(memory.movedim(2, -1).contiguous())
        new = key[t, :, :, None] * value[t, :, None, :]
        memory = decay * memory + new[:, None]
        seen = 2 * (weight * memory).real.sum(1)
        if x.skip is not None:
            seen = seen + x.skip.double()[:, None, None] * new
        output = (query[t, :, :, None] * seen).sum(1)
        return output, torch.view_as_real(memory).movedim(-1, 2)

    return oracle.run(step, x.value, x.cu_seqlens, checks.given_or_zeros(x.state, x))
