"""Kimi Delta Attention."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from supra.bench.rivals.contender import Contender, Inputs, Operation, Setting, fla
from supra.bench.rivals.gated_delta_rule import gated_delta_rule_inputs
from supra.bench.rivals.softmax import SOFTMAX
from supra.kernels.kda import chunk_kda, recurrent_kda


def kda_inputs(setting: Setting) -> Inputs:
    return gated_delta_rule_inputs(setting) | {"log_decay": F.logsigmoid(setting.tokens()) / 16}


def kda(backend: str) -> Contender:
    def whole(**inputs):
        scale = inputs["query"].shape[-1] ** -0.5
        return chunk_kda(**inputs, scale=scale, backend=backend)[0]

    def step(setting):
        inputs, scale = kda_inputs(setting.token()), setting.head_size**-0.5
        state = setting.state()
        return lambda: recurrent_kda(
            **inputs, scale=scale, initial_state=state, return_state=True, in_place=True,
            backend=backend,
        )  # fmt: skip

    return Contender(whole, step)


def transformers_kda(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor
) -> Tensor:
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    return chunk_kimi_delta_attention(query, key, value, log_decay, beta)[0]


def transformers_kda_step(setting: Setting) -> Callable[[], Any]:
    from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention

    query, key, value, beta, log_decay = kda_inputs(setting.token()).values()
    state = setting.state()
    return lambda: recurrent_kimi_delta_attention(
        query, key, value, log_decay, beta, initial_state=state, output_final_state=True
    )


def fla_kda(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    from fla.ops.kda import chunk_kda as theirs

    return theirs(query, key, value, g=log_decay, beta=beta)[0]


def fla_kda_step(setting: Setting) -> Callable[[], Any]:
    from fla.ops.kda import fused_recurrent_kda as theirs

    query, key, value, beta, log_decay = kda_inputs(setting.token()).values()
    state = setting.state()
    return lambda: theirs(
        query, key, value, g=log_decay, beta=beta, initial_state=state, output_final_state=True
    )


KDA = Operation(
    kda_inputs,
    kda,
    {
        "torch softmax attention": SOFTMAX,
        "transformers": Contender(transformers_kda, transformers_kda_step, "transformers"),
        "fla": fla(fla_kda, fla_kda_step),
    },
)
