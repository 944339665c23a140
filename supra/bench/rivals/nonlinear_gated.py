"""Gated linear attention whose state passes through a tanh at every token."""

import torch
import torch.nn.functional as F

from supra.bench.rivals.contender import Contender, Inputs, Operation, Setting
from supra.bench.rivals.softmax import SOFTMAX
from supra.kernels.nonlinear_gated import chunk_nonlinear_gated, recurrent_nonlinear_gated


def nonlinear_gated_inputs(setting: Setting) -> Inputs:
    query, key, value = (setting.tokens() for _ in range(3))
    size = setting.head_size
    return {
        "query": query,
        "key": F.normalize(key, dim=-1),
        "value": value,
        "log_decay": -0.1 * setting.factors(),
        "weight": 2 * torch.rand(setting.heads, size, size, device=setting.device) - 1,
    }


def nonlinear_gated(backend: str) -> Contender:
    def whole(**inputs):
        return chunk_nonlinear_gated(**inputs, backend=backend)[0]

    def step(setting):
        inputs, state = nonlinear_gated_inputs(setting.token()), setting.state()
        return lambda: recurrent_nonlinear_gated(
            **inputs, initial_state=state, return_state=True, in_place=True, backend=backend
        )

    return Contender(whole, step)


NONLINEAR_GATED = Operation(
    nonlinear_gated_inputs, nonlinear_gated, {"torch softmax attention": SOFTMAX}
)
