"""`supra`: normalised linear attention with decay (SUPRA, Mercat et al. 2024, equation 10).

    v'ᵢ = s · GroupNorm( Σ_{j≤i} γ^{i−j} RoPE(φ(qᵢ))·RoPE(φ(kⱼ)) vⱼ )

GroupNorm has one group a head and takes its statistics per token, so it needs no state.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from supra.errors import UserError, check_choice
from supra.kernels.linear_attention import (
    LinearAttentionState,
    chunk_linear_attention,
    recurrent_linear_attention,
)
from supra.mixers.base import AttentionShape, Mixer, MixerInputs
from supra.mixers.feature_maps import FEATURE_MAPS

NORM_EPS = 1e-5
HALF_LIVES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # tokens; what calibration chooses from


@dataclass(frozen=True)
class SupraOptions:
    """The defaults keep the teacher's function at the start; `supra_paper` is the published form.

    feature_map: "sign_pair", "identity" or "mixed_relu" (supra/mixers/feature_maps.py).
    decay: "learnable" or "fixed"; both start from Lightning Attention's slopes.
    scale: whether s, one factor per head and channel, follows the norm. It can be folded into the
        output projection.
    """

    feature_map: str = "sign_pair"
    decay: str = "learnable"
    scale: bool = True

    def __post_init__(self):
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_choice("decay", self.decay, ("learnable", "fixed"))
        if not isinstance(self.scale, bool):
            raise UserError(f"scale (={self.scale!r}) must be true or false")


def lightning_slopes(heads: int) -> Tensor:
    """−log γ of each head: 2^(−8(h+1)/H), for any H. Half-lives run from about 1 to 177 tokens."""
    return torch.exp2(-8 * torch.arange(1, heads + 1, dtype=torch.float32) / heads)


class Supra(Mixer):
    """SUPRA's mixer; state [B, Hq, features, V], a constant size whatever the context."""

    name = "supra"
    Options = SupraOptions
    State = LinearAttentionState

    def __init__(self, shape: AttentionShape, options: SupraOptions):
        super().__init__(shape, options)
        self.feature_map = FEATURE_MAPS[options.feature_map](shape)
        # log(−log γ): any value is a decay below one, and float32 resolves γ near one
        log_slope = lightning_slopes(shape.query_heads).log()
        if options.decay == "learnable":
            self.log_slope = nn.Parameter(log_slope)
        else:  # loading makes every parameter trainable, so what is fixed is none
            self.register_buffer("log_slope", log_slope)
        if options.scale:
            # in units of the head's magnitude: calibrated scales go down to 0.01, and steps of
            # AdamW at a rate of 1e-3 would turn those over within ten
            self.scale = nn.Parameter(torch.empty(shape.query_heads, shape.value_size))
            self.register_buffer("magnitude", torch.ones(shape.query_heads, 1))

    def reset_parameters(self) -> None:
        self.feature_map.reset_parameters()
        self.log_slope.data.copy_(lightning_slopes(self.shape.query_heads).log())
        if self.options.scale:
            self.scale.data.fill_(1.0)
            self.magnitude.fill_(1.0)

    def forward(
        self,
        inputs: MixerInputs,
        state: LinearAttentionState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, LinearAttentionState | None]:
        query, key = self.feature_map(inputs.query, inputs.key)
        if inputs.rotary is not None:
            query, key = rotate_features(inputs, query, key)
        value, log_decay = inputs.value, -self.log_slope.float().exp()
        if inputs.padding_mask is not None:
            kept = inputs.padding_mask[:, :, None]
            key, value = key * kept[..., None], value * kept[..., None]
            log_decay = torch.where(kept, log_decay, 0.0)
        scale = 1 / math.sqrt(self.shape.head_size)
        if query.shape[1] == 1:
            output, state = recurrent_linear_attention(
                query, key, value, log_decay=log_decay, scale=scale,
                initial_state=state, return_state=return_state,
            )  # fmt: skip
        elif inputs.cu_seqlens is not None:
            rows = (x.flatten(0, 1)[None] for x in (query, key, value))
            output, state = chunk_linear_attention(
                *rows, log_decay=log_decay, scale=scale, cu_seqlens=inputs.cu_seqlens
            )
            output = output.view(*query.shape[:3], -1)
        else:
            output, state = chunk_linear_attention(
                query, key, value, log_decay=log_decay, scale=scale,
                initial_state=state, return_state=return_state,
            )  # fmt: skip
        # GroupNorm, one group a head, no bias
        output = nn.functional.layer_norm(output.float(), output.shape[-1:], eps=NORM_EPS)
        if self.options.scale:
            output = output * (self.scale * self.magnitude)
        return output.to(inputs.value.dtype), state

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """Per head, the decay under which least squares leaves the smallest error, and its scale.

        Without it the output has variance one a channel, which in the first layer of a small Llama
        is 20 times what the attention there returns.
        """
        if not self.options.scale:
            return
        target = target.float().flatten(0, 1)  # [B·T, Hq, V]
        best_error = target.new_full((self.shape.query_heads,), torch.inf)
        best_scale, best_slope = torch.zeros_like(self.scale), self.log_slope.clone()
        self.scale.fill_(1.0)
        self.magnitude.fill_(1.0)
        learnable = self.options.decay == "learnable"
        for half_life in HALF_LIVES if learnable else (None,):
            if half_life is not None:
                self.log_slope.fill_(math.log(math.log(2) / half_life))
            output = self(inputs)[0].float().flatten(0, 1)
            scale = (output * target).sum(0) / (output * output).sum(0).clamp(min=NORM_EPS)
            error = (target - scale * output).pow(2).sum((0, 2))
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale[better] = scale[better]
            best_slope[better] = self.log_slope[better]
        self.magnitude.copy_(best_scale.square().mean(1, keepdim=True).sqrt().clamp(min=NORM_EPS))
        self.scale.copy_(best_scale / self.magnitude)
        self.log_slope.copy_(best_slope)


def rotate_features(inputs: MixerInputs, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE on features: each block of head_size features turns as the head itself would."""
    size = inputs.query.shape[-1]
    blocks = [x.unflatten(-1, (-1, size)).flatten(2, 3) for x in (query, key)]
    rotated = inputs.rotary(*blocks)
    return tuple(
        turned.unflatten(2, (x.shape[2], -1)).flatten(3)
        for turned, x in zip(rotated, (query, key), strict=True)
    )
