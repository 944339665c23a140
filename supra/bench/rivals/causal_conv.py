"""The short causal convolution over the channels of all heads, with SiLU."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.bench.rivals.contender import Contender, Inputs, Operation, Setting, fla, on_gpu
from supra.kernels.causal_conv import causal_conv, causal_conv_step

TAPS = 4


def causal_conv_inputs(setting: Setting) -> Inputs:
    width = setting.heads * setting.head_size
    return {
        "input": setting.tokens().flatten(2),
        "weight": setting.normal(width, TAPS),
        "bias": setting.normal(width),
    }


def convolution(backend: str) -> Contender:
    def whole(**inputs):
        return causal_conv(**inputs, activation="silu", backend=backend)[0]

    def step(setting):
        inputs = causal_conv_inputs(setting.token())
        state = _convolution_state(setting)
        return lambda: causal_conv_step(
            **inputs, state=state, activation="silu", in_place=True, backend=backend
        )

    return Contender(whole, step)


def conv1d(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As models call it: channels are moved to the front and back again."""
    width, taps = weight.shape
    output = F.conv1d(input.mT, weight[:, None], bias, padding=taps - 1, groups=width)
    return F.silu(output[..., : input.shape[1]]).mT


def conv1d_step(setting: Setting) -> Callable[[], Any]:
    from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_update

    inputs = causal_conv_inputs(setting.token())
    state = _convolution_state(setting).mT.contiguous()
    token, weight, bias = inputs["input"].mT, inputs["weight"], inputs["bias"]
    return lambda: causal_conv1d_update(token, state, weight, bias, activation="silu")


def fla_convolution(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from fla.modules.causal_conv1d import causal_conv1d

    return causal_conv1d(input, weight, bias, activation="silu")[0]


def fla_convolution_step(setting: Setting) -> Callable[[], Any]:
    from fla.modules.causal_conv1d import causal_conv1d_update

    inputs = causal_conv_inputs(setting.token())
    token, weight, bias = inputs["input"], inputs["weight"], inputs["bias"]
    state = token.new_zeros(*token.mT.shape[:2], TAPS)
    return lambda: causal_conv1d_update(token, state, weight=weight, bias=bias, activation="silu")


def dao_convolution(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(input.mT, weight, bias, activation="silu").mT


def dao_convolution_step(setting: Setting) -> Callable[[], Any]:
    from causal_conv1d import causal_conv1d_update

    inputs = causal_conv_inputs(setting.token())
    state = _convolution_state(setting).mT.contiguous()
    token, weight, bias = inputs["input"][:, 0], inputs["weight"], inputs["bias"]
    return lambda: causal_conv1d_update(token, state, weight, bias, activation="silu")


def _convolution_state(setting: Setting) -> Tensor:
    shape = (setting.batch, TAPS - 1, setting.heads * setting.head_size)
    return torch.zeros(shape, dtype=setting.dtype, device=setting.device)


CAUSAL_CONV = Operation(
    causal_conv_inputs,
    convolution,
    {
        "torch conv1d": Contender(conv1d),
        "transformers": Contender(None, conv1d_step, "transformers"),
        "fla": fla(fla_convolution, fla_convolution_step),
        "causal-conv1d": on_gpu("causal_conv1d", dao_convolution, dao_convolution_step),
    },
)
