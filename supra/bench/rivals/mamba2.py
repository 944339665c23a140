"""The scan of Mamba-2: linear attention with a decay per token and head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from supra.bench.rivals.contender import Contender, Inputs, Operation, Setting, fla, on_gpu
from supra.kernels.linear_attention import (
    LinearAttentionState,
    chunk_linear_attention,
    recurrent_linear_attention,
)

MAMBA2_CHUNK = 256  # the default of its config


def mamba2_inputs(setting: Setting) -> Inputs:
    """Named as in transformers. Each head has its own group, so that the work equals that of linear
    attention."""
    return {
        "hidden_states": setting.tokens(),
        "dt": setting.factors(),
        "A": -torch.rand(setting.heads, device=setting.device),
        "B": setting.tokens(),
        "C": setting.tokens(),
    }


def mamba2(backend: str) -> Contender:
    def arguments(hidden_states, dt, A, B, C):
        value = hidden_states * dt[..., None].to(hidden_states.dtype)
        return {"query": C, "key": B, "value": value, "log_decay": dt * A, "backend": backend}

    def whole(**inputs):
        return chunk_linear_attention(**arguments(**inputs))[0]

    def step(setting):
        inputs = mamba2_inputs(setting.token())
        state = LinearAttentionState(setting.state(), None)
        return lambda: recurrent_linear_attention(
            **arguments(**inputs), initial_state=state, return_state=True, in_place=True
        )

    return Contender(whole, step)


def transformers_mamba2(**inputs: Tensor) -> Tensor:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return mamba2_chunk_scan(**inputs, chunk_size=MAMBA2_CHUNK)


def transformers_mamba2_step(setting: Setting) -> Callable[[], Any]:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    arguments = _one_token(setting)
    return lambda: mamba2_selective_state_update(*arguments, None)


def fla_mamba2(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    value = hidden_states * dt[..., None].to(hidden_states.dtype)
    return chunk_simple_gla(C, B, value, g=dt * A, scale=1.0)[0]


def fla_mamba2_step(setting: Setting) -> Callable[[], Any]:
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    x, dt, A, B, C = mamba2_inputs(setting.token()).values()
    value, log_decay, state = x * dt[..., None].to(x.dtype), dt * A, setting.state()
    return lambda: fused_recurrent_simple_gla(
        C, B, value, g=log_decay, scale=1.0, initial_state=state, output_final_state=True
    )


def mamba_ssm(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(hidden_states, dt, A, B, C, chunk_size=MAMBA2_CHUNK)


def mamba_ssm_step(setting: Setting) -> Callable[[], Any]:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    arguments = _one_token(setting)
    return lambda: selective_state_update(*arguments)


def _one_token(setting: Setting) -> tuple[Tensor, ...]:
    """State, input, dt, A, B and C of one token, without its axis, and expanded to all channels."""
    x, dt, A, B, C = (
        x[:, 0] if x.dim() > 1 else x for x in mamba2_inputs(setting.token()).values()
    )
    size = setting.head_size
    dt, A = dt[..., None].expand(-1, -1, size), A[:, None, None].expand(-1, size, size)
    return setting.state(), x, dt, A, B, C


MAMBA2 = Operation(
    mamba2_inputs,
    mamba2,
    {
        "transformers": Contender(transformers_mamba2, transformers_mamba2_step, "transformers"),
        "fla": fla(fla_mamba2, fla_mamba2_step),
        "mamba-ssm": on_gpu("mamba_ssm", mamba_ssm, mamba_ssm_step),
    },
)
