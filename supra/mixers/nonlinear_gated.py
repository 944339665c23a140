"""`nonlinear_gated`: gated linear attention whose state passes through a tanh at every token.

    Sᵢ = fᵢ Sᵢ₋₁ + (1 − fᵢ) tanh(a ∘ Sᵢ₋₁ + g kᵢvᵢᵀ)        v'ᵢ = s · c · qᵢSᵢ

q, k and v are the teacher's query, key and value, and c is its factor on QKᵀ. a holds one number
for each of the state and starts at 0: with a small g, the start is gated linear attention.

|a| is bounded. Below 1 the recurrence contracts, and Newton's method solves many tokens at once in
a few sweeps. Beyond 1 a number of the state has two resting points and can count; Newton's method
then needs more sweeps, or gives way to a loop over tokens.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from supra.kernels.backends import without_autocast
from supra.mixers.base import Mixer
from supra.mixers.gates import DecayGate, bounded_exp, fill_heads
from supra.mixers.inputs import AttentionShape, MixerInputs
from supra.mixers.read_out import OutputGate
from supra.mixers.recurrence import LINEAR_ATTENTION, NONLINEAR_GATED, scan
from supra.parallel import METHODS, NonlinearGated, solve
from supra.settings.model import STRICT

HALF_LIVES = tuple(4.0**n for n in range(7))  # tokens; candidates in calibration
# biases of keys and queries, in units of these, as in mamba2
KEY_BIAS, QUERY_BIASES = 0.5, (0.0, 0.25, 0.5, 1.0, 2.0)
WRITTEN = 0.1  # root mean square of g k vᵀ at the start, where tanh changes it by a percent
MAX_SWEEPS = 1024  # published numbers are below 20; a loop over tokens costs less than this
SEGMENT = 128  # tokens whose states are in memory together, K · V numbers per head and token


@dataclass(frozen=True, config=STRICT)
class NonlinearGatedOptions:
    """largest: bound of |a|, up to 2.4. Below 1 the recurrence contracts; counting needs more.
    solver: "auto" for the kernels (kernels/nonlinear_gated), which use Newton's method on chunks of
        tokens on a GPU; or a method of supra.parallel.solve.
    sweeps: maximum sweeps of such a method. Tokens that have not converged by then are read one by
        one.
    trust_region: λ > 0 of the solvers "elk" and "quasi_elk". None lets it adapt.
    scale: whether the output is multiplied by s, one factor per head and channel.
    output_gate: whether the output is multiplied by 2σ(Wx + b) of the hidden states.
    rotary: whether queries and keys are rotated to their positions, as in the teacher.
    """

    largest: float = Field(0.9, gt=0, le=2.4)
    solver: Literal["auto", *METHODS] = "auto"
    sweeps: int = Field(8, ge=1, le=MAX_SWEEPS)
    trust_region: float | None = Field(None, gt=0)
    scale: bool = True
    output_gate: bool = True
    rotary: bool = True


class NonlinearGatedState(NamedTuple):
    memory: Tensor  # [B, Hq, K, V], float32, each number between −1 and 1


class NonlinearGatedMixer(Mixer):
    """A matrix state with a tanh in its recurrence."""

    name = "nonlinear_gated"
    Options = NonlinearGatedOptions
    State = NonlinearGatedState
    refuses: ClassVar = dict.fromkeys(
        ("decay_scale", "insert_scale", "norm", "window"),
        "its state is no sum, and bounded already; leave the state_policy off",
    )

    needs_whole_rows = (
        "its state passes through a tanh at every token, so no part of a row can be read before "
        "the parts in front of it"
    )

    def __init__(self, shape: AttentionShape, options: NonlinearGatedOptions):
        super().__init__(
            shape,
            options,
            scale=options.scale,
            output_gate=OutputGate(shape) if options.output_gate else None,
            rotary=options.rotary,
        )
        heads, size = shape.query_heads, shape.head_size
        self.decay_gate = DecayGate(shape)
        self.query_bias = nn.Parameter(torch.empty(heads, size))
        self.key_bias = nn.Parameter(torch.empty(shape.key_heads, size))
        self.log_gain = nn.Parameter(torch.empty(heads))
        self.recurrence = nn.Parameter(torch.empty(heads, size, shape.value_size))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.query_bias.data.zero_()
        self.key_bias.data.zero_()
        self.log_gain.data.fill_(math.log(WRITTEN))
        self.recurrence.data.zero_()

    def mix(
        self,
        inputs: MixerInputs,
        state: NonlinearGatedState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, NonlinearGatedState | None]:
        tensors = self._tensors(inputs)
        memory = None if state is None else state.memory
        valued = inputs.query.device.type != "meta"  # a solver cannot run on shapes alone
        if self.options.solver != "auto" and valued:
            output, memory = self._solved(inputs, tensors, memory)
        else:
            *tensors, log_decay = tensors
            output, memory = scan(
                NONLINEAR_GATED, inputs, *tensors,
                log_decay=log_decay,
                state=memory,
                return_state=return_state,
                scale=inputs.scaling,
                weight=self._weight(),
            )  # fmt: skip
        keeps = return_state and memory is not None
        return output, NonlinearGatedState(memory) if keeps else None

    def _solved(
        self, inputs: MixerInputs, tensors: tuple[Tensor, ...], memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`mix` by a method of `supra.parallel`, which holds all states of a segment in memory.
        Packed documents return no state."""
        query, key, value, log_decay = tensors
        if inputs.padding_mask is not None:
            log_decay = log_decay * inputs.padding_mask[..., None]
        if inputs.watch is not None:
            inputs.watch(log_decay)
        shape, first = query.shape[:2], None
        if inputs.cu_seqlens is not None and shape[1] > 1:
            first = torch.zeros(1, shape.numel(), dtype=torch.bool, device=query.device)
            starts = inputs.cu_seqlens[:-1].long()
            first[0, starts[starts < shape.numel()]] = True
            query, key, value, log_decay = (
                x.flatten(0, 1)[None] for x in (query, key, value, log_decay)
            )
        cell, outputs = NonlinearGated(self._weight().to(query.dtype)), []
        for begin in range(0, query.shape[1], SEGMENT):
            some = slice(begin, begin + SEGMENT)
            drive = tuple(x[:, some] for x in (key, value, log_decay, first) if x is not None)
            states = solve(
                cell, drive, memory, self.options.solver,
                trust_region=self.options.trust_region or "auto",
                max_iterations=self.options.sweeps,
            ).states  # fmt: skip
            memory = states[:, -1]
            with without_autocast(query.device):
                outputs.append(torch.einsum("bthk,bthkv->bthv", query[:, some], states))
        output = torch.cat(outputs, dim=1).view(*shape, *value.shape[2:]) * inputs.scaling
        return output, None if first is not None else memory.contiguous()

    def _weight(self) -> Tensor:
        """a, kept within its bound."""
        return self.options.largest * torch.tanh(self.recurrence / self.options.largest)

    def _tensors(self, inputs: MixerInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value with its gain, and log_decay of every head."""
        query = (inputs.query + self.query_bias).to(inputs.query.dtype)
        key = (inputs.key + self.key_bias).to(inputs.key.dtype)
        query, key = inputs.rotated(query, key)
        wide = torch.promote_types(inputs.value.dtype, torch.float32)
        groups = self.shape.query_heads // self.shape.key_heads
        key, value = (x.to(wide).repeat_interleave(groups, dim=2) for x in (key, inputs.value))
        log_decay = self.decay_gate(inputs.hidden_states).to(wide)
        return query.to(wide), key, value * bounded_exp(self.log_gain)[:, None], log_decay

    def matrix(self, inputs: MixerInputs) -> Tensor:
        """[B, Hq, T, T] of the linear part. The tanh is left out."""
        query, key, _, log_decay = self._tensors(inputs)
        batch, tokens, heads, _ = query.shape
        written = -torch.expm1(log_decay) * bounded_exp(self.log_gain)
        identity = torch.eye(tokens, dtype=query.dtype, device=query.device)
        output, _ = scan(
            LINEAR_ATTENTION, inputs, query, key * written[..., None],
            identity[None, :, None].expand(batch, -1, heads, -1),
            log_decay=log_decay, state=None, return_state=False, scale=inputs.scaling,
        )  # fmt: skip
        return output.transpose(1, 2)

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """Set the gain per head. Then choose per head, one after the other: the decay, the bias of
        the query; and the scale with each."""
        if not self.options.scale:
            return
        query, key = inputs.magnitudes()
        groups = self.shape.query_heads // self.shape.key_heads
        value = inputs.value.float().square().mean((0, 1, 3)).sqrt().clamp(min=1e-5)
        self.log_gain.data.copy_((WRITTEN / (key * value)).log().repeat_interleave(groups))
        self.choose(inputs, target, HALF_LIVES, self.decay_gate.set_half_life)
        fill_heads(self.key_bias, KEY_BIAS * key)
        self.choose(
            inputs, target, QUERY_BIASES, lambda bias: fill_heads(self.query_bias, bias * query)
        )
        self.choose(inputs, target, HALF_LIVES, self.decay_gate.set_half_life)
