"""The recurrences of native layers as mixers: their states, decays and channels.

A native layer keeps its projections and its norm. What lies between them, the short convolution and
the recurrence, runs here, with the kernels and the state policies of all mixers.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from supra.kernels.linear_attention import LinearAttentionState
from supra.mixers.base import Mixer
from supra.mixers.delta_layer import DeltaLayer, of_length_one
from supra.mixers.gated_deltanet import GatedDeltaNetState
from supra.mixers.inputs import AttentionShape, MixerInputs
from supra.mixers.mamba2 import Mamba2State
from supra.mixers.recurrence import GATED_DELTA_RULE, LINEAR_ATTENTION, scan
from supra.mixers.short_conv import convolve
from supra.model.offload import weights_of


@dataclass(frozen=True, kw_only=True)
class NativeInputs(MixerInputs):
    """Query, key and value are those before the short convolution. G groups of heads share a query
    and a key, which are [B, T, G, K]; value is [B, T, H, V]."""

    layer: nn.Module  # the native layer, for the weights between its projections
    strength: Tensor  # [B, T, H], float32 at least: Δ of Mamba-2, β of the delta rule
    log_decay: Tensor  # [B, T, H], float32 at least

    def first(self, tokens: int) -> "NativeInputs":
        """The first tokens of every row."""
        cut = {name: getattr(self, name)[:, :tokens] for name in ("strength", "log_decay")}
        return replace(super().first(tokens), **cut)

    def convolved(
        self, names: tuple[str, ...], state: Tensor | None, return_state: bool
    ) -> tuple["NativeInputs", Tensor | None]:
        """The inputs after the layer's short convolution over `names`, with a query and a key for
        every head; and the state of the convolution."""
        conv = self.layer.conv1d
        settings = {"activation": "silu", "state": state, "return_state": return_state}
        with weights_of(conv):
            inputs, state = convolve(self, names, conv.weight[:, 0], conv.bias, **settings)
        groups = inputs.value.shape[2] // inputs.key.shape[2]
        shared = {name: repeated(getattr(inputs, name), groups) for name in ("query", "key")}
        return replace(inputs, **shared), state


class NativeMamba2(Mixer):
    """Sᵢ = exp(A Δᵢ) Sᵢ₋₁ + Δᵢ Bᵢxᵢᵀ, yᵢ = CᵢSᵢ + D xᵢ (Dao & Gu 2024), where C, B and x are query,
    key and value. It has no weights of its own."""

    name = "mamba2"
    State = Mamba2State

    def __init__(self, shape: AttentionShape):
        super().__init__(shape, None)

    def mix(
        self, inputs: NativeInputs, state: Mamba2State | None = None, return_state: bool = False
    ) -> tuple[Tensor, Mamba2State | None]:
        memory, conv_state = state or (None, None)
        names = ("value", "key", "query")
        inputs, conv_state = inputs.convolved(names, conv_state, return_state)
        value = inputs.value
        output, end = scan(
            LINEAR_ATTENTION, inputs, inputs.query, inputs.key,
            (inputs.strength[..., None] * value).to(value.dtype),
            log_decay=inputs.log_decay,
            state=None if memory is None else LinearAttentionState(memory, None),
            return_state=return_state,
        )  # fmt: skip
        output = torch.addcmul(output, inputs.layer.D[:, None], value)
        return output, None if end is None else Mamba2State(end.memory, conv_state)


class NativeGatedDelta(Mixer):
    """Sᵢ = γᵢ (1 − βᵢ kᵢkᵢᵀ) Sᵢ₋₁ + βᵢ kᵢvᵢᵀ, oᵢ = K^-½ qᵢSᵢ (Yang, Kautz & Hatamizadeh 2024, eq.
    10), with q and k of length 1. It has no weights of its own."""

    name = "gated_deltanet"
    State = GatedDeltaNetState
    refuses: ClassVar = DeltaLayer.refuses

    def __init__(self, shape: AttentionShape):
        super().__init__(shape, None)

    def mix(
        self, inputs: NativeInputs, state: Any = None, return_state: bool = False
    ) -> tuple[Tensor, GatedDeltaNetState | None]:
        memory, conv_state = state or (None, None)
        names = ("query", "key", "value")
        inputs, conv_state = inputs.convolved(names, conv_state, return_state)
        output, memory = scan(
            GATED_DELTA_RULE, inputs, of_length_one(inputs.query), of_length_one(inputs.key),
            inputs.value, inputs.strength,
            log_decay=inputs.log_decay,
            state=memory,
            return_state=return_state,
            scale=self.shape.head_size**-0.5,
        )  # fmt: skip
        return output, None if memory is None else GatedDeltaNetState(memory, conv_state)


def repeated(x: Tensor, count: int) -> Tensor:
    """Each head of x [B, T, H, K] `count` times, side by side. A single head is not copied."""
    return x[:, :, :, None].expand(-1, -1, -1, count, -1).flatten(2, 3)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
