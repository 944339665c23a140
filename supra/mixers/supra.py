"""`supra`: linear attention with decay, the mixer of SUPRA (Mercat et al. 2024, equation 10).

    v'ᵢ = s · GroupNorm( Σ_{j≤i} γ^{i−j} RoPE(φ(qᵢ))·RoPE(φ(kⱼ)) vⱼ )

Options give its relatives: other feature maps, decays from the hidden states, weights that sum to
one. Several of them have names of their own, the presets of `supra.mixers`.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from supra.errors import UserError
from supra.kernels.linear_attention import LinearAttentionState
from supra.mixers.base import Mixer
from supra.mixers.feature_maps import (
    FEATURE_MAPS,
    FEATURE_SIZE,
    MAX_EXPANSION,
    build_feature_map,
    check_expansion,
    check_qk_norm,
    choose_sharpness,
    map_features,
)
from supra.mixers.gates import DecayGate, bounded_exp, slope_of_half_life
from supra.mixers.inputs import AttentionShape, MixerInputs
from supra.mixers.read_out import OutputGate, group_norm
from supra.mixers.recurrence import LINEAR_ATTENTION, scan
from supra.settings.model import STRICT

HALF_LIVES = tuple(3.0**n for n in range(8))  # tokens, 1 to 2187; candidates in calibration
# Of Hedgehog features. Perplexity of SmolLM2-135M: 1,087 with 1 for keys and queries, as published;
# 698 with this value for keys and the calibrated one for queries.
KEY_SHARPNESS = 0.5


@dataclass(frozen=True, config=STRICT)
class SupraOptions:
    """The defaults keep the teacher's function at the start.

    feature_map: "sign_pair", "identity", "relu", "shared_relu", "hedgehog" or "mixed_relu"
        (supra/mixers/feature_maps.py).
    feature_size: features of a head with "shared_relu", at most as many as it has channels.
    qk_norm: whether the features of all heads together pass through a LayerNorm before they are
        rotated; for feature maps whose features are rotated.
    expansion: how many times as wide the features and the state are; for feature maps with weights
        per head.
    decay: "learnable" or "fixed", one per head, both from Lightning Attention's slopes; "gated",
        one per token and head, from the hidden states; or "none".
    normalize: "group", GroupNorm with one group per head, which reads one token and needs no state;
        "sum", division by the sum of the weights, for nonnegative features; or "none".
    scale: whether the output is multiplied by s, one factor per head and channel. It can be folded
        into the output projection.
    output_gate: whether the output is multiplied by 2σ(Wx + b) of the hidden states.
    rotary: whether queries and keys are rotated to their positions, as in the teacher.
    """

    feature_map: Literal[*FEATURE_MAPS] = "sign_pair"
    feature_size: int = Field(FEATURE_SIZE, ge=1, le=MAX_EXPANSION)
    qk_norm: bool = False
    expansion: int = Field(1, ge=1, le=MAX_EXPANSION)
    decay: Literal["learnable", "fixed", "gated", "none"] = "learnable"
    normalize: Literal["group", "sum", "none"] = "group"
    scale: bool = True
    output_gate: bool = False
    rotary: bool = True

    def __post_init__(self):
        check_expansion(self.expansion, self.feature_map)
        if self.qk_norm:
            check_qk_norm(self.feature_map)
        if self.normalize == "sum" and not FEATURE_MAPS[self.feature_map].after_rotary:
            raise UserError(
                f"normalize (='sum') needs features that stay nonnegative, and those of "
                f"feature_map (={self.feature_map!r}) need not: take relu or hedgehog, or "
                "normalize=group"
            )


def lightning_slopes(heads: int) -> Tensor:
    """−log γ of each head: 2^(−8(h+1)/H), for any H. Half-lives run from about 1 to 177 tokens."""
    return torch.exp2(-8 * torch.arange(1, heads + 1, dtype=torch.float32) / heads)


class Supra(Mixer):
    """Linear attention; state [B, Hq, features, V], a constant size whatever the context."""

    name = "supra"
    Options = SupraOptions
    State = LinearAttentionState

    def __init__(self, shape: AttentionShape, options: SupraOptions):
        super().__init__(
            shape,
            options,
            norm=group_norm if options.normalize == "group" else None,
            scale=options.scale,
            output_gate=OutputGate(shape) if options.output_gate else None,
            rotary=options.rotary,
        )
        self.feature_map = build_feature_map(
            options.feature_map,
            shape,
            options.expansion,
            feature_size=options.feature_size,
            qk_norm=options.qk_norm,
        )
        if options.decay == "gated":
            self.decay_gate = DecayGate(shape)
        elif options.decay != "none":
            # log(−log γ): every value is a decay below 1, and float32 resolves γ near 1
            log_slope = lightning_slopes(shape.query_heads).log()
            if options.decay == "learnable":
                self.log_slope = nn.Parameter(log_slope)
            else:  # a buffer, since loading makes every parameter trainable
                self.register_buffer("log_slope", log_slope)

    @property
    def averages(self) -> bool:
        return self.options.normalize == "sum"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.options.decay in ("learnable", "fixed"):
            self.log_slope.data.copy_(lightning_slopes(self.shape.query_heads).log())

    def mix(
        self,
        inputs: MixerInputs,
        state: LinearAttentionState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, LinearAttentionState | None]:
        query, key = map_features(self.feature_map, inputs, inputs.query, inputs.key)
        return scan(
            LINEAR_ATTENTION, inputs, query, key, inputs.value,
            log_decay=self._log_decay(inputs),
            state=state,
            return_state=return_state,
            normalize="sum" if self.options.normalize == "sum" else None,
            scale=1 / math.sqrt(self.shape.head_size),
        )  # fmt: skip

    def read_out(self, inputs: MixerInputs, output: Tensor) -> Tensor:
        return super().read_out(inputs, output.float())

    def _log_decay(self, inputs: MixerInputs) -> Tensor | None:
        if self.options.decay == "none":
            return None
        if self.options.decay == "gated":
            return self.decay_gate(inputs.hidden_states)
        return -bounded_exp(self.log_slope.float())

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """Choose per head: the decay, the sharpness of the query's features, and the scale.

        Without it, every channel of the output has variance 1. In the first layer of a small Llama
        that is 20 times what attention returns.
        """
        if not self.options.scale:
            return
        self._choose_decay(inputs, target)
        if self.options.feature_map == "hedgehog":
            choose_sharpness(self, inputs, target, KEY_SHARPNESS)
            self._choose_decay(inputs, target)

    def _choose_decay(self, inputs: MixerInputs, target: Tensor) -> None:
        if self.options.decay == "gated":
            self.choose(inputs, target, HALF_LIVES, self.decay_gate.set_half_life)
        elif self.options.decay == "learnable":
            self.choose(inputs, target, HALF_LIVES, self._set_half_life)
        else:
            self.choose(inputs, target, (0.0,), lambda _: None)

    def _set_half_life(self, tokens: Tensor) -> None:
        self.log_slope.data.copy_(slope_of_half_life(tokens))
