"""The gated delta rule."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from supra.bench.rivals.contender import Contender, Inputs, Operation, Setting, fla
from supra.bench.rivals.softmax import SOFTMAX
from supra.kernels.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule


def gated_delta_rule_inputs(setting: Setting) -> Inputs:
    query, key, value = (setting.tokens() for _ in range(3))
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    beta, log_decay = setting.factors(), -0.1 * setting.factors()
    return {"query": query, "key": key, "value": value, "beta": beta, "log_decay": log_decay}


def gated_delta_rule(backend: str) -> Contender:
    def whole(**inputs):
        scale = inputs["query"].shape[-1] ** -0.5
        return chunk_gated_delta_rule(**inputs, scale=scale, backend=backend)[0]

    def step(setting):
        inputs, scale = gated_delta_rule_inputs(setting.token()), setting.head_size**-0.5
        state = setting.state()
        return lambda: recurrent_gated_delta_rule(
            **inputs, scale=scale, initial_state=state, return_state=True, in_place=True,
            backend=backend,
        )  # fmt: skip

    return Contender(whole, step)


def transformers_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor
) -> Tensor:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(query, key, value, log_decay, beta)[0]


def transformers_gated_delta_rule_step(setting: Setting) -> Callable[[], Any]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    query, key, value, beta, log_decay = gated_delta_rule_inputs(setting.token()).values()
    state = setting.state()
    return lambda: torch_recurrent_gated_delta_rule(
        query, key, value, log_decay, beta, initial_state=state, output_final_state=True
    )


def fla_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor
) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as theirs

    return theirs(query, key, value, g=log_decay, beta=beta)[0]


def fla_gated_delta_rule_step(setting: Setting) -> Callable[[], Any]:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule as theirs

    query, key, value, beta, log_decay = gated_delta_rule_inputs(setting.token()).values()
    state = setting.state()
    return lambda: theirs(
        query, key, value, g=log_decay, beta=beta, initial_state=state, output_final_state=True
    )


GATED_DELTA_RULE = Operation(
    gated_delta_rule_inputs,
    gated_delta_rule,
    {
        "torch softmax attention": SOFTMAX,
        "transformers": Contender(
            transformers_gated_delta_rule, transformers_gated_delta_rule_step, "transformers"
        ),
        "fla": fla(fla_gated_delta_rule, fla_gated_delta_rule_step),
    },
)
