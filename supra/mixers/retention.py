"""`retention`: RetNet's multi-scale retention (Sun et al. 2023, arXiv 2307.08621, equation 8).

    Sᵢ = γ Sᵢ₋₁ + RoPE(kᵢ)vᵢᵀ        v'ᵢ = s · SiLU(Wuᵢ + b) · GroupNorm(c · RoPE(qᵢ)Sᵢ)

Linear attention with a fixed decay per head, γₕ = 1 − 2^(−5−h) for h = 0, 1, …: the half-lives are
22, 44, 88, … tokens. q, k and v are the teacher's, c is its factor on QKᵀ, and RoPE is its rotation
in place of the paper's. The paper also rescales the weights of each token (section 2.2). That is
left out: all weights of a token share the factor, and the norm cancels it.
"""

from typing import Literal, NamedTuple

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from supra.kernels.linear_attention import LinearAttentionState
from supra.mixers.base import Mixer
from supra.mixers.inputs import AttentionShape, MixerInputs
from supra.mixers.read_out import RmsNorm, SiLUGate, group_norm
from supra.mixers.recurrence import LINEAR_ATTENTION, scan
from supra.settings.model import STRICT

NORMS = {"group": group_norm, "rms": RmsNorm()}


@dataclass(frozen=True, config=STRICT)
class RetentionOptions:
    """normalize: "group", GroupNorm with one group per head, as in the paper; or "rms", RMSNorm
        per head, as in the authors' code.
    scale: whether the output is multiplied by s, one factor per head and channel.
    output_gate: whether the output is multiplied by SiLU(Wu + b) of the hidden states u.
    rotary: whether queries and keys are rotated to their positions, as in the teacher.
    """

    normalize: Literal[*NORMS] = "group"
    scale: bool = True
    output_gate: bool = True
    rotary: bool = True


class RetentionState(NamedTuple):
    memory: Tensor  # [B, Hq, K, V], float32


def retention_log_decay(heads: int) -> Tensor:
    """log(1 − 2^(−5−h)) of each head h: [H], float32. Exact even where γ rounds to 1."""
    exponents = -5 - torch.arange(heads, dtype=torch.float64)
    return torch.log1p(-torch.exp2(exponents)).float()


class Retention(Mixer):
    """Linear attention with a fixed decay per head and a norm per token."""

    name = "retention"
    Options = RetentionOptions
    State = RetentionState

    def __init__(self, shape: AttentionShape, options: RetentionOptions):
        super().__init__(
            shape,
            options,
            norm=NORMS[options.normalize],
            scale=options.scale,
            output_gate=SiLUGate(shape) if options.output_gate else None,
            rotary=options.rotary,
        )
        # a buffer: loading makes every parameter trainable
        self.register_buffer("log_decay", retention_log_decay(shape.query_heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.log_decay.copy_(retention_log_decay(self.shape.query_heads))

    def mix(
        self,
        inputs: MixerInputs,
        state: RetentionState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, RetentionState | None]:
        query, key = inputs.rotated(inputs.query, inputs.key)
        output, end = scan(
            LINEAR_ATTENTION, inputs, query, key, inputs.value,
            log_decay=self.log_decay,
            state=None if state is None else LinearAttentionState(state.memory, None),
            return_state=return_state,
            scale=inputs.scaling,
        )  # fmt: skip
        return output, None if end is None else RetentionState(end.memory)

    def read_out(self, inputs: MixerInputs, output: Tensor) -> Tensor:
        wide = torch.promote_types(output.dtype, torch.float32)  # the norm is of float32 sums
        return super().read_out(inputs, output.to(wide))

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """The scale under which least squares leaves the smallest error. All else is fixed."""
        if self.options.scale:
            self.choose(inputs, target, (0.0,), lambda _: None)
