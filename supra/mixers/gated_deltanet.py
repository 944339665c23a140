"""`gated_deltanet`: the linear layer of Qwen3.5 in the place of attention. Other engines run it.

It is the layer of supra/mixers/delta_layer.py with

    γ = exp(−exp(A) softplus(W_a u + a)) per head        gate(u) = SiLU(W_z u)

This is Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, section 3.3). The layer of Qwen3.5 has no
biases but a: the start of W_z is a multiple of w.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from supra.mixers.delta_layer import DeltaLayer, DeltaLayerOptions
from supra.mixers.gates import HeadLogits, bounded_exp, slope_of_half_life
from supra.mixers.inputs import AttentionShape
from supra.mixers.read_out import SiLUGate
from supra.mixers.recurrence import GATED_DELTA_RULE
from supra.settings.model import STRICT

LARGEST_A = 16  # exp(A) at the start, as published; they are drawn from 0 on


@dataclass(frozen=True, config=STRICT)
class GatedDeltaNetOptions(DeltaLayerOptions):
    """conv_size: taps of the convolution over query, key and value; 1 for none.
    sign_pairs: whether each head has [x, −x] in the place of x, since SiLU nearly removes negative
        numbers; null: if such a head has at most 256 channels.
    beta_range: the largest β, at most 2. Over 1 the state can change the sign of what it holds.
        Only 1 can be exported.
    rotary: whether queries and keys are rotated to their positions, as in the teacher. Only without
        it the layer can be exported.
    init: "teacher": a start near an average of values; or "published", random, for models that are
        trained from the start: steps of the decay from 1e-3 to 0.1, exp(A) up to 16, convolutions
        and gates as those of `nn.Conv1d` and `nn.Linear`.
    """


class GatedDeltaNetState(NamedTuple):
    memory: Tensor  # [B, Hq, P · K, P · V], float32
    conv_state: Tensor  # [B, conv_size − 1, channels of query, key and value], the newest last


class GatedDeltaNet(DeltaLayer):
    """Qwen3.5's gated delta rule, with keys and values of its own for every query head."""

    name = "gated_deltanet"
    Options = GatedDeltaNetOptions
    State = GatedDeltaNetState
    operation = GATED_DELTA_RULE

    def __init__(self, shape: AttentionShape, options: GatedDeltaNetOptions):
        super().__init__(shape, options, partial(SiLUGate, bias=False))

    def _add_decay(self, shape: AttentionShape) -> None:
        self.dt = HeadLogits(shape)
        self.A_log = nn.Parameter(torch.empty(shape.query_heads))

    def _log_decay(self, hidden_states: Tensor) -> Tensor:
        return -bounded_exp(self.A_log) * F.softplus(self.dt(hidden_states))

    def _prepared_decay(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        slope, bias = -bounded_exp(self.A_log), self.dt.bias.detach()
        return self.dt.weight, lambda x: slope * F.softplus(x + bias)

    def _set_half_life(self, tokens: Tensor) -> None:
        """Every step starts at 1: some engines compute softplus as log(1 + exp), which is inexact
        for small steps."""
        self.dt.set(torch.full_like(tokens, math.log(math.expm1(1))))
        self.A_log.data.copy_(slope_of_half_life(tokens))

    def _reset_decay_as_published(self) -> None:
        self.dt.reset_as_published()
        self.A_log.data.copy_((LARGEST_A * (1 - torch.rand(self.A_log.shape))).log())

    def _set_constant(self, direction: Tensor) -> None:
        super()._set_constant(direction)
        self.output_gate.open(direction)
