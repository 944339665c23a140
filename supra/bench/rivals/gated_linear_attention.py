"""Linear attention with a decay per key channel."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from supra.bench.rivals.contender import Contender, Inputs, Operation, Setting, fla
from supra.bench.rivals.softmax import SOFTMAX
from supra.kernels.gated_linear_attention import (
    chunk_gated_linear_attention,
    recurrent_gated_linear_attention,
)


def gated_linear_attention_inputs(setting: Setting) -> Inputs:
    query, key, value, gate = (setting.tokens() for _ in range(4))
    return {"query": query, "key": key, "value": value, "log_decay": F.logsigmoid(gate) / 16}


def gated_linear_attention(backend: str) -> Contender:
    def whole(**inputs):
        return chunk_gated_linear_attention(**inputs, backend=backend)[0]

    def step(setting):
        inputs = gated_linear_attention_inputs(setting.token())
        state = setting.state()
        return lambda: recurrent_gated_linear_attention(
            **inputs, initial_state=state, return_state=True, in_place=True, backend=backend
        )

    return Contender(whole, step)


def fla_gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor
) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(query, key, value, log_decay, scale=1.0)[0]


def fla_gated_linear_attention_step(setting: Setting) -> Callable[[], Any]:
    from fla.ops.gla import fused_recurrent_gla

    inputs = gated_linear_attention_inputs(setting.token()).values()
    state = setting.state()
    return lambda: fused_recurrent_gla(
        *inputs, scale=1.0, initial_state=state, output_final_state=True
    )


GATED_LINEAR_ATTENTION = Operation(
    gated_linear_attention_inputs,
    gated_linear_attention,
    {
        "torch softmax attention": SOFTMAX,
        "fla": fla(fla_gated_linear_attention, fla_gated_linear_attention_step),
    },
)
