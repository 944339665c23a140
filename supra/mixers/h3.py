"""`h3`: Hungry Hungry Hippos (Fu et al. 2023, section 3) in the place of attention.

    kᵢ' = Σ_{l<64} Fₗ kᵢ₋ₗ + b_k        Mᵢ = κ ∗ (k' vᵀ) + D kᵢ'vᵢᵀ        v'ᵢ = s · (a qᵢ + b_q) Mᵢ
    κₗ = 2 Re Σₙ Cₙ B̄ₙ Āₙˡ

Keys pass through a short convolution (the shift). A diagonal state-space model (S4D, Gu et al.
2022, with bilinear discretisation) runs over the products of key and value, and the query gates its
output. q, k and v are the teacher's. Heads of attention are cut into heads of `head_size` channels,
each with a model of its own.
"""

import functools
import math
from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from supra.errors import LARGEST, UserError
from supra.kernels.causal_conv.api import MAX_TAPS
from supra.kernels.long_conv import chunk_ssm_conv, recurrent_ssm_conv
from supra.mixers.base import Mixer
from supra.mixers.bounded import Row, Tensors, padding_last, run_documents
from supra.mixers.gates import bounded_exp, published_log_steps
from supra.mixers.inputs import AttentionShape, MixerInputs
from supra.mixers.padding import rows_and_padding
from supra.mixers.read_out import OutputGate
from supra.mixers.short_conv import ShortConv
from supra.mixers.state_policy import PolicyRun
from supra.settings.model import STRICT

HALF_LIVES = tuple(4.0**n for n in range(7))  # tokens; candidates in calibration
SKIPS = (-1.0, -0.3, 0.0, 0.1, 0.3, 1.0, 3.0, 10.0)  # D
CONTENT = (0.0, 0.25, 0.5, 1.0)  # factors of the query in its gate, in units of 1 / its RMS
KEY_CONTENT = 0.25  # factor of the key in its gate
MAX_STATE = 4096  # numbers per channel; published models have 64
OTHER_MODES = 1e-4  # C of all modes but the first at the start; at 0 their A would not learn


@dataclass(frozen=True, config=STRICT)
class H3Options:
    """head_size: channels per head; divides the attention's head sizes. The state grows with it. 1
        is what hybrids were published with; the attention's own head size gives linear attention
        with κ as its decay.
    d_state: numbers in the state per channel, two for each mode.
    shift_size: taps of the shift.
    gates: whether shifted keys and queries multiply. Without them S4D alone mixes the values, the
        baseline of the H3 paper.
    init: "teacher": gates near 1 and a κ that averages, so that the teacher's output projection
        reads averaged values, as from attention; or "published".
    scale: whether the output is multiplied by s, one factor per head and channel.
    output_gate: whether the output is multiplied by 2σ(Wx + b) of the hidden states.
    """

    head_size: int = Field(1, ge=1, le=LARGEST)
    d_state: int = Field(64, ge=1, le=MAX_STATE)
    shift_size: int = Field(MAX_TAPS, ge=1, le=MAX_TAPS)
    gates: bool = True
    init: Literal["teacher", "published"] = "teacher"
    scale: bool = True
    output_gate: bool = True

    def __post_init__(self):
        if self.d_state % 2:
            raise UserError(f"d_state (={self.d_state}) must be even: a mode holds two numbers")


class H3State(NamedTuple):
    memory: Tensor  # [B, H, modes, 2, head_size, values of a head], float32; real and imaginary
    conv_state: Tensor | None  # [B, shift_size − 1, Hkv · K], the newest last; None without gates


def blocks_of(shape: AttentionShape, size: int) -> int:
    """How many heads of that size one head of attention is cut into."""
    if size == shape.head_size:
        return 1
    if shape.head_size % size or shape.value_size % size:
        raise UserError(
            f"head_size (={size}) must divide the attention's heads, of size {shape.head_size} "
            f"(query, key) and {shape.value_size} (value), or be the former"
        )
    return shape.value_size // size


class DiagonalModel(nn.Module):
    """S4D with H heads and M modes, started as S4D-Lin: Aₙ = −1/2 + iπn. Cₙ includes Bₙ."""

    def __init__(self, heads: int, modes: int):
        super().__init__()
        self.log_dt = nn.Parameter(torch.empty(heads))
        self.log_A_real = nn.Parameter(torch.empty(heads, modes))
        self.A_imag = nn.Parameter(torch.empty(heads, modes))
        self.C = nn.Parameter(torch.empty(heads, modes, 2))
        self.D = nn.Parameter(torch.empty(heads))

    def reset_parameters(self) -> None:
        """κ averages: almost only the first mode counts, whose taps sum to 4 Re C₀."""
        self.log_A_real.data.fill_(-math.log(2))
        self.A_imag.data.copy_(math.pi * torch.arange(self.A_imag.shape[1]))
        self.C.data.fill_(OTHER_MODES)[:, 0] = torch.tensor([0.25, 0.0])
        self.D.data.zero_()

    def reset_as_published(self) -> None:
        self.log_dt.data.copy_(published_log_steps(self.log_dt.shape))
        self.C.data.normal_(std=math.sqrt(0.5))
        self.D.data.normal_()

    def set_half_life(self, tokens: Tensor) -> None:
        """Start the first mode of every head [H] with this half-life."""
        self.log_dt.data.copy_((4 * torch.tanh(math.log(2) / 2 / tokens.double())).log())

    def forward(self) -> dict[str, Tensor]:
        """The arguments of the kernel: log |Ā|, arg Ā, C B̄ and D, from Ā = (1 + z) / (1 − z) and
        B̄ = dt / (1 − z), where z = dt A / 2."""
        dt = bounded_exp(self.log_dt)[:, None]
        x, y = -dt * bounded_exp(self.log_A_real) / 2, dt * self.A_imag / 2
        below = (1 - x).square() + y.square()  # |1 − z|²
        real, imaginary = dt * (1 - x) / below, dt * y / below
        c_real, c_imaginary = self.C.unbind(-1)
        weight = c_real * real - c_imaginary * imaginary, c_real * imaginary + c_imaginary * real
        return {
            "log_decay": (4 * x / below).clamp(min=-1 + 1e-6).log1p() / 2,
            "frequency": torch.atan2(y, 1 + x) + torch.atan2(y, 1 - x),
            "weight": torch.stack(weight, dim=-1),
            "skip": self.D,
        }


class H3(Mixer):
    """A shift SSM, a diagonal SSM, and two gates."""

    name = "h3"
    Options = H3Options
    State = H3State
    from_scratch: ClassVar = {"init": "published", "scale": False, "output_gate": False}

    def __init__(self, shape: AttentionShape, options: H3Options):
        super().__init__(
            shape,
            options,
            scale=options.scale,
            output_gate=OutputGate(shape) if options.output_gate else None,
        )
        self.blocks = blocks_of(shape, options.head_size)
        if options.gates:
            self.shift = ShortConv(shape.key_heads * shape.head_size, options.shift_size)
            self.query_weight = nn.Parameter(torch.empty(shape.query_heads, shape.head_size))
            self.query_bias = nn.Parameter(torch.empty(shape.query_heads, shape.head_size))
        self.model = DiagonalModel(shape.query_heads * self.blocks, options.d_state // 2)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        heads, published = self.shape.query_heads, self.options.init == "published"
        if self.options.gates and published:
            self.query_weight.data.fill_(1.0)
            self.query_bias.data.zero_()
            bound = 1 / math.sqrt(self.options.shift_size)
            self.shift.weight.data.uniform_(-bound, bound)[:, -1].add_(
                torch.randn(len(self.shift.weight))
            )
        elif self.options.gates:
            # for queries and keys whose product has size 1 with the usual factor 1/√K
            size = self.shape.head_size**-0.25
            self._set_gates(torch.full((heads,), size), torch.full((self.shape.key_heads,), size))
        if published:
            self.model.reset_as_published()
        else:
            self._set_half_life(4 * 512 ** (torch.arange(heads) / max(1, heads - 1)))

    def mix(
        self, inputs: MixerInputs, state: H3State | None = None, return_state: bool = False
    ) -> tuple[Tensor, H3State | None]:
        memory, conv_state = state or (None, None)
        if self.options.gates:
            inputs, conv_state = self.shift(
                inputs, ("key",), state=conv_state, return_state=return_state
            )
        value = self._spread(inputs.value).unflatten(-1, (self.blocks, -1)).flatten(2, 3)
        tensors = *self._gates(inputs), value
        output, memory = filter_documents(inputs, tensors, self.model(), memory, return_state)
        output = output.view(*inputs.query.shape[:3], -1)
        return output, None if memory is None else H3State(memory, conv_state)

    def _gates(self, inputs: MixerInputs) -> tuple[Tensor | None, Tensor | None]:
        """Query, and the shifted key, in blocks: [B, T, H, head_size] each."""
        if not self.options.gates:
            return None, None
        query = (inputs.query * self.query_weight + self.query_bias).to(inputs.value.dtype)
        return self._cut(query), self._cut(self._spread(inputs.key))

    def _spread(self, x: Tensor) -> Tensor:
        """Repeat key or value heads for the query heads that share them."""
        return x.repeat_interleave(self.shape.query_heads // self.shape.key_heads, dim=2)

    def _cut(self, x: Tensor) -> Tensor:
        """[B, T, Hq, K] to [B, T, H, head_size]: the block of x for each block of the value."""
        x = x.unflatten(-1, (-1, self.options.head_size))
        if (count := x.shape[3]) != self.blocks:  # values are narrower or wider than keys
            x = x[:, :, :, torch.arange(self.blocks, device=x.device) * count // self.blocks]
        return x.flatten(2, 3)

    def matrix(self, inputs: MixerInputs) -> Tensor:
        """[B, Hq, T, T]: the mean over the blocks of each head of attention."""
        batch, tokens, heads, _ = inputs.query.shape
        if self.options.gates:
            inputs, _ = self.shift(inputs, ("key",))
        identity = torch.eye(tokens, dtype=inputs.value.dtype, device=inputs.value.device)
        value = identity[None, :, None].expand(batch, -1, heads, -1)
        gates, model, total = self._gates(inputs), self.model(), 0
        for n in range(self.blocks):  # one by one: a matrix per channel would not fit in memory
            tensors = *(x if x is None else x[:, :, n :: self.blocks] for x in gates), value
            part = {name: x[n :: self.blocks] for name, x in model.items()}
            total = total + filter_documents(inputs, tensors, part)[0]
        return total.transpose(1, 2) / self.blocks

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """Choose per head of attention, one after the other: κ's half-life, the factor of the query
        in its gate, the skip; and the scale with each."""
        if not self.options.scale:
            return
        if self.options.init == "published":  # random: only the scale can be chosen
            self.choose(inputs, target, (0.0,), lambda _: None)
            return
        query, key = inputs.magnitudes()
        if self.options.gates:
            self._set_gates(KEY_CONTENT / query, KEY_CONTENT / key)
        self.choose(inputs, target, HALF_LIVES, self._set_half_life)
        if self.options.gates:
            self.choose(inputs, target, CONTENT, lambda a: self._set_gates(a / query, None))
        self.choose(inputs, target, SKIPS, self._set_skip)

    def _set_gates(self, query: Tensor, key: Tensor | None) -> None:
        """Both gates as (1 + factor · x) / √head_size, with a factor per head [Hq] and [Hkv]."""
        one = self.options.head_size**-0.5
        self.query_weight.data.copy_((one * query)[:, None].expand_as(self.query_weight))
        self.query_bias.data.fill_(one)
        if key is not None:
            self.shift.weight.data.zero_()[:, -1] = one * key.repeat_interleave(
                self.shape.head_size
            )
            self.shift.bias.data.fill_(one)

    def _set_half_life(self, tokens: Tensor) -> None:
        self.model.set_half_life(tokens.repeat_interleave(self.blocks))

    def _set_skip(self, weight: Tensor) -> None:
        self.model.D.data.copy_(weight.repeat_interleave(self.blocks))


def filter_documents(
    inputs: MixerInputs,
    tensors: tuple[Tensor | None, Tensor | None, Tensor],
    model: dict[str, Tensor],
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run a diagonal SSM over query, key and value [B, T, H, …] of each document."""
    query, key, value = tensors
    policy = None if inputs.policy_run is None else inputs.policy_run.policy
    if policy is not None:
        log_decay = policy.scaled_log_decay(model["log_decay"])
        model = model | {"log_decay": log_decay, "weight": policy.scaled(model["weight"])}
    if inputs.watch is not None:
        inputs.watch(model["log_decay"].amax(-1))  # of the slowest mode
    recurrence = functools.partial(padding_last, functools.partial(_filter, model))
    windowed = functools.partial(_windowed, model)
    tensors = value, query, key
    if inputs.part is not None:
        _, own = run_documents(recurrence, windowed, inputs, tensors, None, True)
        state = _state_before(inputs, model, own)
    output, end = run_documents(recurrence, windowed, inputs, tensors, state, return_state)
    return output.reshape(value.shape), end


def _state_before(inputs: MixerInputs, model: dict[str, Tensor], own: Tensor) -> Tensor:
    """The states before the sequences of a part of the rows. own: the states after them, from empty
    ones: [N, H, modes, 2, K, V]."""
    mask = inputs.padding_mask
    rows, tokens = inputs.query.shape[:2]
    count = torch.full((rows,), tokens, device=own.device) if mask is None else mask.sum(1)
    count = count.double()[:, None, None]  # a million turns have an error of 0.1 in float32
    size, angle = (count * model[name].double() for name in ("log_decay", "frequency"))
    real, imaginary = size.exp() * angle.cos(), size.exp() * angle.sin()
    turn = torch.stack([real, -imaginary, imaginary, real], -1).unflatten(-1, (2, 2))
    modes = own.flatten(1, 2).flatten(3)  # [N, H · modes, 2, K · V]
    before = inputs.part.state_before(turn.flatten(1, 2), modes, inputs.cu_seqlens)
    return before.view(own.shape)


def _filter(model: dict[str, Tensor], tensors: Tensors, row: Row) -> tuple[Tensor, Tensor | None]:
    """Run the SSM over value, query and key of rows with their padding last."""
    settings = {"initial_state": row.state, "return_state": row.return_state}
    value, query, key = tensors
    if row.padding_mask is None:
        form = recurrent_ssm_conv if value.shape[1] == 1 else chunk_ssm_conv
        if row.cu_seqlens is not None:
            settings["cu_seqlens"] = row.cu_seqlens
        return form(query, key, value, **model, **settings)
    # the model decays at every token, so padding becomes a sequence of its own, from a zero state
    if row.state is not None:
        states = torch.stack([row.state, torch.zeros_like(row.state)], 1).flatten(0, 1)
        settings["initial_state"] = states
    settings["cu_seqlens"] = rows_and_padding(row.padding_mask)
    rows = (x if x is None else x.flatten(0, 1)[None] for x in (query, key, value))
    output, end = chunk_ssm_conv(*rows, **model, **settings)
    return output.view(value.shape), None if end is None else end[::2]


def _windowed(
    model: dict[str, Tensor], run: PolicyRun, tensors: Tensors, row: Row
) -> tuple[Tensor, Tensor | None]:
    """The SSM over the last r tokens: from its output, that of the state r tokens ago, decayed by
    Āʳ, is subtracted."""
    value, query, key = tensors
    size, weight = run.policy.window, model["weight"]
    names = {"value": value} | ({} if key is None else {"key": key})
    old = run.delay(names, row.padding_mask, row.cu_seqlens)
    left = torch.polar((size * model["log_decay"]).exp(), size * model["frequency"])
    weight = torch.view_as_real(left * torch.view_as_complex(weight.contiguous()))
    before = replace(row, state=run.past.past_state)
    late, end_late = _filter(
        model | {"weight": weight, "skip": None}, (old["value"], query, old.get("key")), before
    )
    run.past = run.past._replace(past_state=end_late)
    output, end = _filter(model, tensors, row)
    return output - late, end
