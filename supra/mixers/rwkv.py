"""`rwkv`: RWKV-6's recurrence (Peng et al. 2024, equation 19) in the place of attention.

    Sᵢ = diag(wᵢ) Sᵢ₋₁ + kᵢvᵢᵀ        yᵢ = c · rᵢ (Sᵢ₋₁ + diag(u) kᵢvᵢᵀ)        v'ᵢ = s · g yᵢ
    wᵢ = exp(−exp(w₀ + tanh(xᵢA) B))

r, k and v are the teacher's query, key and value, as in RADLADS (Goldstein et al. 2025), c is its
factor on QKᵀ, and xᵢ are the hidden states. The decay w differs by channel and token. A token reads
the state before its own decay, and itself with the weight u.

The form "qrwkv" is the layer of QRWKV (RADLADS), as llama.cpp runs it: yᵢ = c · rᵢ Sᵢ, without u.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from supra.kernels.backends import without_autocast
from supra.mixers.base import Mixer
from supra.mixers.gates import bounded_exp, fill_heads, slope_of_half_life
from supra.mixers.inputs import AttentionShape, MixerInputs
from supra.mixers.one_token import Step, as_dtype, flat, joined, projection, rotated, shaped
from supra.mixers.options import Form
from supra.mixers.read_out import OutputGate, group_norm
from supra.mixers.recurrence import GATED_LINEAR_ATTENTION, scan
from supra.mixers.short_conv import convolve, convolved_identity
from supra.settings.model import STRICT

HALF_LIVES = tuple(4.0**n for n in range(7))  # tokens; candidates in calibration
# Biases of k and r, in units of keys and queries. They bring each weight near a constant plus the
# score, as the teacher's exponentials are for small scores. The error on SmolLM2-135M falls by a
# quarter.
KEY_BIAS, QUERY_BIASES = 0.5, (0.0, 0.25, 0.5, 1.0, 2.0)
QRWKV_KEY_BIAS = 0.25  # an error of 0.47 on SmolLM2-135M, where 0.5 gives 0.48
BONUSES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
MAX_RANK = 4096  # published models have 64 and 128
SMALL = 1e-3  # entries of B at the start

# A layer of QRWKV: `rwkv6qwen2` in llama.cpp.
QRWKV = Form(
    fixed={
        "balance_state": True, "token_shift": False, "normalize": "none", "output_gate": True,
        "rotary": False,
    },
    defaults={},
)  # fmt: skip


@dataclass(frozen=True, config=STRICT)
class RwkvOptions:
    """form: "supra", or "qrwkv", a layer of QRWKV, which llama.cpp runs: without u, without rotary
        positions and without a bias in the gate.
    rank: columns of A, the rank of the part of the decay that depends on the token.
    balance_state: whether k is multiplied by 1 − w, which turns the sums into averages.
    token_shift: whether r, k, v and x are mixed with those of the token before, by a share per
        channel that is 0 at the start.
    normalize: "none", or "group", GroupNorm with one group per head, as published.
    scale: whether the output is multiplied by s, one factor per head and channel.
    output_gate: whether the output is multiplied by g = 2σ(Wx + b) of the hidden states.
    rotary: whether queries and keys are rotated to their positions, as in the teacher.
    """

    forms: ClassVar = {"qrwkv": QRWKV}

    form: Literal["supra", "qrwkv"] = "supra"
    rank: int = Field(64, ge=1, le=MAX_RANK)
    balance_state: bool = True
    token_shift: bool = False
    normalize: Literal["none", "group"] = "none"
    scale: bool = True
    output_gate: bool = True
    rotary: bool = True


class RwkvState(NamedTuple):
    memory: Tensor  # [B, Hq, K, V], float32
    conv_state: Tensor | None  # [B, 1, channels of v, k, r and x], with token_shift


class ChannelDecay(nn.Module):
    """log w = −exp(w₀ + tanh(xA) B) per head and channel. In float32 also under autocast."""

    def __init__(self, shape: AttentionShape, rank: int):
        super().__init__()
        self.sizes = shape.query_heads, shape.head_size
        self.w0 = nn.Parameter(torch.empty(self.sizes))
        self.A = nn.Parameter(torch.empty(shape.hidden_size, rank))
        self.B = nn.Parameter(torch.empty(rank, math.prod(self.sizes)))

    def reset_parameters(self) -> None:
        """A is random and B small: both learn, and decays start nearly constant."""
        fixed = torch.Generator().manual_seed(0)
        self.A.data.copy_(torch.randn(self.A.shape, generator=fixed) / math.sqrt(len(self.A)))
        self.B.data.copy_(torch.randn(self.B.shape, generator=fixed) * SMALL)
        heads = self.sizes[0]
        self.set_half_life(4 * 512 ** (torch.arange(heads) / max(1, heads - 1)))

    def set_half_life(self, tokens: Tensor) -> None:
        """Start all channels of every head [Hq] with this half-life."""
        self.w0.data.copy_(slope_of_half_life(tokens)[:, None])

    def prepared(self) -> Callable[[Tensor], Tensor]:
        """The same in a step: from hidden states [B, D], float32 or wider, to [B, Hq · K]."""
        down = projection(self.A.t(), None, self.A.dtype)
        up = projection(self.B.t(), self.w0.flatten(), self.B.dtype)
        return lambda x: bounded_exp(up(down(x).tanh_())).neg_()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, Hq, K]."""
        with without_autocast(x.device):
            moved = (x.to(self.A.dtype) @ self.A).tanh() @ self.B
            return -bounded_exp(self.w0 + moved.unflatten(-1, self.sizes))


class Rwkv(Mixer):
    """Linear attention with a decay per channel and token, and a bonus for the current token."""

    name = "rwkv"
    Options = RwkvOptions
    State = RwkvState

    def __init__(self, shape: AttentionShape, options: RwkvOptions):
        published = options.form == "qrwkv"
        super().__init__(
            shape,
            options,
            norm=group_norm if options.normalize == "group" else None,
            scale=options.scale,
            output_gate=OutputGate(shape, bias=not published) if options.output_gate else None,
            rotary=options.rotary,
        )
        self.decay = ChannelDecay(shape, options.rank)
        sizes = shape.query_heads, shape.head_size
        self.bonus = None if published else nn.Parameter(torch.empty(sizes))
        self.query_bias = nn.Parameter(torch.empty(shape.query_heads, shape.head_size))
        self.key_bias = nn.Parameter(torch.empty(shape.key_heads, shape.head_size))
        if options.token_shift:
            values = shape.key_heads * shape.value_size
            features = (shape.key_heads + shape.query_heads) * shape.head_size
            self.shift = nn.Parameter(torch.empty(values + features + shape.hidden_size))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bonus is not None:
            self.bonus.data.fill_(1.0)
        self.query_bias.data.zero_()
        self.key_bias.data.zero_()
        if self.options.token_shift:
            self.shift.data.zero_()

    def mix(
        self, inputs: MixerInputs, state: RwkvState | None = None, return_state: bool = False
    ) -> tuple[Tensor, RwkvState | None]:
        memory, conv_state = state or (None, None)
        if self.options.token_shift:
            inputs, conv_state = self._shift(inputs, conv_state, return_state)
        output, memory = self._scan(inputs, memory, return_state)
        return output, None if memory is None else RwkvState(memory, conv_state)

    def prepared_step(self, dtype: torch.dtype) -> Step | None:
        """With k and r side by side."""
        if self.options.token_shift:
            return None
        heads, size = (self.shape.key_heads, self.shape.query_heads), self.shape.head_size
        sizes = sum(heads) * size, heads[0] * self.shape.value_size
        groups, decay = heads[1] // heads[0], self.decay.prepared()
        read_out = self.prepared_read_out(dtype)
        bias = torch.cat([self.key_bias, self.query_bias])
        bonus = None if self.bonus is None else self.bonus.view(heads[0], groups, size)

        def step(inputs: MixerInputs, state: RwkvState) -> tuple[Tensor, RwkvState]:
            batch, hidden = inputs.query.shape[0], flat(inputs.hidden_states)
            by_group, by_head = (batch, heads[0], groups), (batch * heads[1], 1, -1)
            given = as_dtype(joined(inputs, ("key", "query", "value")), state.memory)
            features, value = given.split_with_sizes(sizes, 2)
            features = rotated(features.view(batch, sum(heads), size) + bias, inputs.rotary)
            key, query = features.split_with_sizes(heads, 1)
            query, key = shaped(query, *by_head), key.view(batch, heads[0], 1, size)
            log_decay = decay(as_dtype(hidden, bias)).view(*by_group, size)
            if self.options.balance_state:
                key = key * torch.expm1(log_decay).neg_()
            value = value.view(batch, heads[0], 1, 1, -1)
            memory = state.memory * as_dtype(log_decay, state.memory).exp().view(
                batch, heads[1], size, 1
            )
            memory.view(*by_group, *memory.shape[2:]).addcmul_(key.unsqueeze(-1), value)
            scale, read = inputs.scaling, memory if bonus is None else state.memory
            read = shaped(read, -1, *read.shape[2:])
            if bonus is None:
                output = torch.baddbmm(read[:, :1], query, read, beta=0, alpha=scale)
            else:  # the token itself is added with a weight of its own
                own = (query.view(*by_group, size) * bonus * key).sum(-1, True).unsqueeze(-1)
                own = (own * value).view(by_head)
                output = torch.baddbmm(own, query, read, beta=scale, alpha=scale)
            return read_out(output, hidden), RwkvState(memory, None)

        return step

    def _shift(
        self, inputs: MixerInputs, state: Tensor | None = None, return_state: bool = False
    ) -> tuple[MixerInputs, Tensor | None]:
        """The inputs, each moved towards that of the token before; and the last token's."""
        names = ("value", "key", "query", "hidden_states")
        return convolve(inputs, names, self._taps(), state=state, return_state=return_state)

    def _taps(self) -> Tensor:
        return torch.stack([self.shift, 1 - self.shift], dim=1)

    def _scan(
        self, inputs: MixerInputs, memory: Tensor | None = None, return_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The recurrence over r, k, v and the decays."""
        query = (inputs.query + self.query_bias).to(inputs.query.dtype)
        key = (inputs.key + self.key_bias).to(inputs.key.dtype)
        query, key = inputs.rotated(query, key)
        # every query head has a memory of its own, since it has its own decays
        groups = self.shape.query_heads // self.shape.key_heads
        key, value = (x.repeat_interleave(groups, dim=2) for x in (key, inputs.value))
        log_decay = self.decay(inputs.hidden_states)
        if self.options.balance_state:
            key = (key * -torch.expm1(log_decay)).to(key.dtype)
        return scan(
            GATED_LINEAR_ATTENTION, inputs, query, key, value,
            log_decay=log_decay,
            state=memory,
            return_state=return_state,
            bonus=self.bonus,
            scale=inputs.scaling,
        )  # fmt: skip

    def matrix(self, inputs: MixerInputs) -> Tensor:
        """[B, Hq, T, T]. The shares of the token shift differ by channel: here each head uses their
        mean."""
        if not self.options.token_shift:
            return super().matrix(inputs)
        taps = self._taps()[: self.shape.key_heads * self.shape.value_size]
        shifted, _ = self._shift(inputs)
        output, _ = self._scan(replace(shifted, value=convolved_identity(inputs, taps)))
        return output.transpose(1, 2)

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """Choose per head, one after the other: the decay, the bias of r, the bonus; and the scale
        with each."""
        if not self.options.scale:
            return
        query, key = inputs.magnitudes()
        self.choose(inputs, target, HALF_LIVES, self.decay.set_half_life)
        bias = QRWKV_KEY_BIAS if self.options.form == "qrwkv" else KEY_BIAS
        fill_heads(self.key_bias, bias * key)
        self.choose(
            inputs, target, QUERY_BIASES, lambda bias: fill_heads(self.query_bias, bias * query)
        )
        if self.bonus is not None:
            self.choose(inputs, target, BONUSES, lambda weight: fill_heads(self.bonus, weight))
        self.choose(inputs, target, HALF_LIVES, self.decay.set_half_life)
