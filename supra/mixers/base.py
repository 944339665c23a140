"""The contract of every mixer: a drop-in for softmax(QKᵀ)V inside a pretrained attention module.

Notation: B batch, T tokens of this call, Hq query heads, Hkv key/value heads (Hkv divides Hq),
K head size of query and key, V head size of value, D hidden size. Layout [B, T, H, D].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from supra.errors import UserError, not_finite
from supra.mixers.channel_scales import channel_scales
from supra.mixers.exported import step_by_step, takes_steps
from supra.mixers.inputs import MIN_POWER, AttentionShape, MixerInputs, Watch
from supra.mixers.one_token import Prepared, Step, is_one_token, may_prepare, sources_of
from supra.mixers.read_out import Norm, OutputGate, RmsNorm
from supra.mixers.signs import ONE_SIGN, Signs, signed
from supra.mixers.state_policy import LayerPolicy, Past, PolicyRun, StatePolicy, with_past

# Fields of states that had another name in files of earlier versions, each with its name today.
RENAMED_FIELDS = {
    "recent": "conv_state",
    "recent_key": "window_key",
    "recent_value": "window_value",
}


class Mixer(nn.Module, ABC):
    """Mixes tokens along T. Concrete mixers are final: none subclasses another.

    A mixer is two steps. `mix` sums values over tokens. `read_out` turns each token's sums into its
    output, with the norm, the scale and the gate that the mixer hands to `__init__`.

    What every mixer owes (tests/mixers/test_contract*.py):

    - Parameters are float32 and live under `<attention>.mixer.*`. Tensors that are not trained are
      registered buffers, and `reset_parameters` writes them too.
    - Padded tokens change neither the state nor the outputs of other tokens.
    - Nothing crosses a document boundary.
    - A state is a NamedTuple of tensors with the batch first. The cache reorders, repeats and
      restores these tensors and knows nothing else about them.
    - Rows may lie on several ranks (`inputs.part`). `scan` and `short_conv` see to that. What needs
      other tokens asks the part for them, and what needs whole rows says so in `needs_whole_rows`.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    State: ClassVar[type]  # a NamedTuple of tensors
    branches: ClassVar[tuple[str, ...]] = ()  # names of the parts, if the mixer adds up several
    only: str | None = None  # the one branch that runs alone, to measure its share
    recurrent: ClassVar[bool] = True  # whether the state has the same size for every context
    drops_qk_norm: ClassVar[bool] = False  # of the teacher's QK-norm, only the weight acts
    refuses: ClassVar[dict[str, str]] = {}  # fields of StatePolicy that cannot act here, and why
    from_scratch: ClassVar[dict[str, Any]] = {}  # options that `supra init` sets: as published
    averages: bool = False  # whether `mix` gives values weights of 0 or more that sum to one
    policy: LayerPolicy | None = None
    watch: Watch | None = None  # called with the log decays of every call
    needs_whole_rows: str | None = None  # why rows cannot lie on several ranks; None: they can
    gate_first: bool = False  # whether `read_out` begins with the gate
    _prepared: Prepared | None = None

    def __init__(
        self,
        shape: AttentionShape,
        options: Any,
        *,
        norm: Norm | None = None,
        scale: bool = False,
        output_gate: OutputGate | None = None,
        signs: Signs = ONE_SIGN,
        rotary: bool = True,
    ):
        """norm, scale, output_gate: the pieces of `read_out`, each of which may be absent. The
        scale is a trained factor per head and channel of the sums.

        signs: the sums of a head are a block of V channels for each sign. The output is the blocks
            added up; at the start, with these signs.
        rotary: whether `mix` gets the family's rotation.
        """
        super().__init__()
        self.shape = shape
        self.options = options
        self.norm = norm
        # The factors are stored in units of each head's magnitude: calibrated factors go down to
        # 0.01, and AdamW at a rate of 1e-3 would flip the sign of those within ten steps.
        self.signs, sizes = signs, (shape.query_heads, len(signs) * shape.value_size)
        self.scale = nn.Parameter(torch.empty(sizes)) if scale else None
        self.register_buffer("magnitude", torch.ones(sizes[0], 1) if scale else None)
        self.output_gate = output_gate
        self.rotates = rotary

    def reset_parameters(self) -> None:
        """Write the starting values into the parameters and the fixed buffers, in place."""
        if self.scale is not None:
            ones = torch.ones(self.shape.query_heads, self.shape.value_size)
            self.set_scale(signed(ones, self.signs))
        for module in self.children():
            module.reset_parameters()

    def forward(
        self, inputs: MixerInputs, state: Any = None, return_state: bool = False
    ) -> tuple[Tensor, Any]:
        """Mix the tokens of one call, which follow those in `state`.

        Returns the output [B, T, Hq, V] in the value's dtype, and the new state or None. Some
        policies remember past tokens: the state then has the fields of Past as well.
        """
        inputs = self.placed(inputs)
        if (step := self._step_for(inputs, state)) is not None:
            output, end = step(inputs, state)
            return output, end if return_state else None
        if self.recurrent and takes_steps(inputs):
            return step_by_step(self, inputs, state)
        output, end = self._mix_and_read(inputs, state, return_state)
        first, *others = self.in_blocks(output).unbind(-2)
        return sum(others, first).to(inputs.value.dtype), end

    def _mix_and_read(
        self, inputs: MixerInputs, state: Any = None, return_state: bool = False
    ) -> tuple[Tensor, Any]:
        """Under the policy: what is read out, [B, T, Hq, P · V], and the new state."""
        if self.watch is not None:
            inputs = replace(inputs, watch=self.watch)
        own, past = self._split(state)
        run = None if self.policy is None else PolicyRun(self.policy, past)
        output, end = self.mix(
            replace(inputs, policy_run=run) if run else inputs, own, return_state
        )
        if end is not None and run is not None and self.policy.keeps_past:
            end = self.state_type(*end, *run.past)
        return self.read_out(inputs, output), end

    def prepared_step(self, dtype: torch.dtype) -> Step | None:
        """The function of one token, for activations of this dtype, with all that it reads of the
        parameters; None if `mix` is as good."""
        return None

    def _step_for(self, inputs: MixerInputs, state: Any) -> Step | None:
        """The step, if it can run this call. It is made anew when parameters have changed, and
        after a call that it cannot run, such as the next prompt or a step of training."""
        if torch.compiler.is_compiling():
            return None  # a graph that looked at the step would be compiled again without it
        dtype, known = inputs.value.dtype, self._prepared
        bare = self.policy is None and self.watch is None and type(state) is self.State
        if not (bare and is_one_token(inputs)):
            self._forget_step()
            return None
        if known is None or not known.fits(dtype):
            step = self.prepared_step(dtype) if may_prepare(self) else None
            self._prepared = known = Prepared(dtype, step, sources_of(self))
        return known.step

    def _forget_step(self) -> None:
        if self._prepared is not None:
            self._prepared = None

    def _apply(self, *args, **kwargs):
        self._forget_step()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": None}  # a function cannot be pickled

    def placed(self, inputs: MixerInputs) -> MixerInputs:
        """The inputs without their rotation, if the options leave it out."""
        return inputs if self.rotates else replace(inputs, rotary=None)

    def _split(self, state: Any) -> tuple[Any, Past | None]:
        """The mixer's own state, and what the policy keeps beside it."""
        if state is None:
            return None, None
        if not isinstance(state, self.state_type):
            raise UserError(
                f"past_key_values hold a {type(state).__name__}, and {self.name} keeps a "
                f"{self.state_type.__name__}: they were made under another state_policy or by "
                "another model; begin with an empty cache"
            )
        own = len(self.State._fields)
        return self.State(*state[:own]), Past(*state[own:]) if len(state) > own else None

    @property
    def state_type(self) -> type:
        """The NamedTuple that `forward` returns as its state."""
        keeps_past = self.policy is not None and self.policy.keeps_past
        return with_past(self.State) if keeps_past else self.State

    def static_state(self, state: Any, inputs: MixerInputs, tokens: int) -> Any:
        """The state in tensors of its own that keep their size, for compiled decoding of rows of up
        to `tokens` tokens. inputs: of the call that the state is from."""
        return type(state)(
            *(x if x is None else x.clone(memory_format=torch.contiguous_format) for x in state)
        )

    def growing_state(self, state: Any) -> Any:
        """The state that `static_state` was made from, with what was written since."""
        return state

    def set_policy(self, policy: StatePolicy | None, layer: int) -> None:
        """Bound the state as a policy says for this layer. Softmax attention keeps no such state.

        Raises UserError for a field of the policy that cannot act on this mixer.
        """
        if not self.recurrent:
            return
        for name, reason in self.refuses.items():
            value = None if policy is None else getattr(policy, name)
            if value not in (None, getattr(StatePolicy, name)):
                raise UserError(
                    f"{name} (={value}) cannot act on layer {layer} ({self.name}): {reason}"
                )
        self.policy = None if policy is None else policy.of_layer(layer)
        if self.policy is not None:
            self.policy.check_heads(self.shape.query_heads)

    @abstractmethod
    def mix(
        self, inputs: MixerInputs, state: Any = None, return_state: bool = False
    ) -> tuple[Tensor, Any]:
        """Sum values over tokens.

        Returns the sums [B, T, Hq, V], linear in the value, and the new state or None. With sign
        pairs, the sums are [B, T, Hq, 2V].
        """

    def read_out(self, inputs: MixerInputs, output: Tensor) -> Tensor:
        """The sums of each token after norm, then scale, then gate; or after the gate first. Shape
        as it was."""
        if self.gate_first:
            return self.scaled(self.normalized(self.gated(output, inputs)))
        return self.gated(self.scaled(self.normalized(output)), inputs)

    def prepared_read_out(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        """`read_out` in a step: from sums of B · Hq · P · V numbers, in this order, and hidden
        states [B, D] to the output [B, 1, Hq, V] in this dtype."""
        heads, blocks = self.shape.query_heads, len(self.signs)
        norm = self.norm
        sizes = heads, blocks * self.shape.value_size
        if norm is None and blocks == 1:  # nothing here looks at heads
            sizes = (sizes[0] * sizes[1],)
        scale = None if self.scale is None else (self.scale * self.magnitude).view(sizes)
        if isinstance(norm, RmsNorm):
            norm = norm.prepared(next(self.parameters()))
        gate = None if self.output_gate is None else self.output_gate.prepared(dtype)
        gate_first = self.gate_first and gate is not None

        def read_out(output: Tensor, hidden_states: Tensor) -> Tensor:
            batch = hidden_states.shape[0]
            output = output.view(batch, *sizes)
            factors = None if gate is None else gate(hidden_states)
            if factors is not None and len(sizes) > 1:
                factors = factors.view(output.shape)
            if gate_first:
                output, factors = output * factors, None
            output = output if norm is None else norm(output)
            output = output if scale is None else output * scale
            output = output if factors is None else output * factors
            if blocks > 1:
                output = output.view(batch, heads, blocks, -1).sum(2)
            output = output.view(batch, 1, heads, -1)
            return output if output.dtype == dtype else output.to(dtype)

        return read_out

    def in_blocks(self, output: Tensor) -> Tensor:
        """What is read out, [B, T, Hq, P · V] for P signs, as [B, T, Hq, P, V]."""
        return output.unflatten(-1, (len(self.signs), -1))

    def normalized(self, output: Tensor) -> Tensor:
        """The output after the norm, if the mixer has one."""
        return output if self.norm is None else self.norm(output)

    def scaled(self, output: Tensor) -> Tensor:
        """The output times the scale, if the mixer has one."""
        return output if self.scale is None else output * (self.scale * self.magnitude)

    def gated(self, output: Tensor, inputs: MixerInputs) -> Tensor:
        """The output times the output gate, if the mixer has one."""
        if self.output_gate is None:
            return output
        return output * self.output_gate(inputs.hidden_states)

    def mixing_matrix(self, inputs: MixerInputs) -> Tensor:
        """How much the value at token j contributes to the sum at token i: [B, Hq, T, T].

        Takes memory for T² numbers per head; meant for T of a few hundred.
        """
        return self.matrix(self.placed(inputs))

    def matrix(self, inputs: MixerInputs) -> Tensor:
        """`mixing_matrix`, of inputs that have the rotation that the options ask for."""
        batch, tokens, heads, _ = inputs.value.shape
        identity = torch.eye(tokens, dtype=inputs.value.dtype, device=inputs.value.device)
        value = identity[None, :, None].expand(batch, -1, heads, -1)
        output, _ = self.mix(replace(inputs, value=value))
        return output.transpose(1, 2)

    def calibrate(self, inputs: MixerInputs, target: Tensor) -> None:
        """Choose starting values that bring the output closer to `target` [B, T, Hq, V], the output
        of softmax attention on the same inputs. In place. The default does nothing."""

    def choose(
        self,
        inputs: MixerInputs,
        target: Tensor,
        candidates: Sequence[float],
        assign: Callable[[Tensor], None],
    ) -> None:
        """Give every head the candidate whose output is closest to `target` in mean square.

        `assign` writes one value per head, [Hq]. If the mixer has a scale, each candidate is judged
        with its own least-squares scale per channel, and the winner's scale is set as well. Raises
        UserError if no candidate has a finite error.
        """
        inputs, scaled = self.placed(inputs), self.scale is not None
        target = target.float().flatten(0, 1)  # [B·T, Hq, V]
        best_error = target.new_full((self.shape.query_heads,), torch.inf)
        best = torch.empty_like(best_error)
        ones = target.new_ones(len(best), len(self.signs) * target.shape[-1])
        best_scale = torch.empty_like(ones)
        if scaled:
            self.set_scale(ones)
        for candidate in candidates:
            assign(torch.full_like(best, candidate))
            output, _ = self._mix_and_read(inputs)
            blocks = self.in_blocks(output).float().flatten(0, 1)  # [B·T, Hq, P, V]
            scale = channel_scales(blocks, target) if scaled else torch.ones_like(blocks[0])
            error = (target - (scale * blocks).sum(2)).pow(2).sum((0, 2))
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale[better], best[better] = scale.flatten(1)[better], candidate
        if not best_error.isfinite().all():
            what = f"calibration of {self.name}: the teacher's attention input or output"
            raise not_finite(what, inputs.query.dtype)
        assign(best)
        if scaled:
            self.set_scale(best_scale)

    def set_taps(self, taps: Tensor, outputs: Sequence[Tensor], target: Tensor) -> None:
        """Give each channel of values the taps, and the scale, of the smallest error.

        taps: of the values' convolution, [Hq, P · V, W], in place. outputs: what each tap alone
        gives, W times [B, T, Hq, V].
        """
        alone = torch.stack([x.float().flatten(0, 1) for x in outputs], 2)
        found = channel_scales(alone, target.float().flatten(0, 1)).mT
        size = found.norm(dim=-1).clamp(min=MIN_POWER)  # [Hq, V]
        taps.copy_((found / size[..., None]).repeat(1, len(self.signs), 1))
        self.set_scale(signed(size, self.signs))

    def set_scale(self, scale: Tensor) -> None:
        """Store factors per head and channel, [Hq, P · V], as magnitude times scale."""
        magnitude = scale.square().mean(1, keepdim=True).sqrt().clamp(min=MIN_POWER)
        self.magnitude.data.copy_(magnitude)
        self.scale.data.copy_(scale / magnitude)


def current_name(name: str) -> str:
    """Today's name of a state's tensor in a file: `0.conv_state` for `0.recent`."""
    path, dot, field = name.rpartition(".")
    return path + dot + RENAMED_FIELDS.get(field, field)


@contextmanager
def float32_at_least() -> Iterator[None]:
    """Inside, new tensors are at least float32, whatever the default dtype is.

    transformers sets the default dtype to bf16 while it builds a bf16 model, and bf16 would round
    decays and starting values.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(default, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(default)
