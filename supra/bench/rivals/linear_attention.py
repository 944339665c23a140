"""Linear attention with a normalizer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from supra.bench.rivals.contender import Contender, Inputs, Operation, Setting, fla
from supra.bench.rivals.softmax import SOFTMAX
from supra.kernels.linear_attention import (
    LinearAttentionState,
    chunk_linear_attention,
    recurrent_linear_attention,
)


def linear_attention_inputs(setting: Setting) -> Inputs:
    query, key, value = (setting.tokens() for _ in range(3))
    return {"query": query.abs_(), "key": key.abs_(), "value": value}


def linear_attention(backend: str) -> Contender:
    def whole(**inputs):
        return chunk_linear_attention(**inputs, normalize="sum", backend=backend)[0]

    def step(setting):
        inputs = linear_attention_inputs(setting.token())
        memory = setting.state()
        state = LinearAttentionState(memory, memory[..., 0].contiguous())
        return lambda: recurrent_linear_attention(
            **inputs, normalize="sum", initial_state=state, return_state=True, in_place=True,
            backend=backend,
        )  # fmt: skip

    return Contender(whole, step)


def fla_linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(query, key, value, normalize=True)[0]


def fla_linear_attention_step(setting: Setting) -> Callable[[], Any]:
    from fla.ops.linear_attn import fused_recurrent_linear_attn

    inputs = linear_attention_inputs(setting.token()).values()
    state = setting.state()
    states = state, state[:, None, :, :, 0].contiguous()
    return lambda: fused_recurrent_linear_attn(
        *inputs, initial_state=states, output_final_state=True, normalize=True
    )


LINEAR_ATTENTION = Operation(
    linear_attention_inputs,
    linear_attention,
    {
        "torch softmax attention": SOFTMAX,
        "fla": fla(fla_linear_attention, fla_linear_attention_step),
    },
)
