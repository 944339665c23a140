"""The checks of the contract see faults: small wrong mixers each fail the check that CAUGHT names.

A fault counts as caught only if an assertion fails. A crash would say nothing about the check.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from supra.kernels.linear_attention import LinearAttentionState
from supra.mixers import MIXERS, Mixer
from supra.mixers.recurrence import LINEAR_ATTENTION, scan
from tests.mixers import test_contract as contract
from tests.mixers import test_contract_loading as loading

SHAPE = contract.SHAPES[0]
LOG_DECAY = -0.1


@dataclass(frozen=True)
class Options:
    """None."""


class State(NamedTuple):
    memory: Tensor  # [B, Hq, K, V]


class Sound(Mixer):
    """The smallest mixer that passes every check: decaying sums, with one fixed decay."""

    name, Options, State = "planted", Options, State

    def __init__(self, shape, options):
        super().__init__(shape, options, scale=True)
        self.register_buffer("log_decay", torch.empty(shape.query_heads))

    def reset_parameters(self):
        super().reset_parameters()
        self.log_decay.fill_(LOG_DECAY)

    def mix(self, inputs, state=None, return_state=False):
        query, key = inputs.rotated(inputs.query, inputs.key)
        output, end = scan(
            LINEAR_ATTENTION, inputs, query, key, inputs.value,
            log_decay=self.log_decay,
            state=None if state is None else LinearAttentionState(state.memory, None),
            return_state=return_state,
        )  # fmt: skip
        return output, None if end is None else State(end.memory)


class PaddingLeaks(Sound):
    def mix(self, inputs, *state):
        return super().mix(dataclasses.replace(inputs, padding_mask=None), *state)


class DocumentsLeak(Sound):
    def mix(self, inputs, *state):
        return super().mix(dataclasses.replace(inputs, cu_seqlens=None), *state)


class StateIsDropped(Sound):
    def mix(self, inputs, state=None, return_state=False):
        return super().mix(inputs, None, return_state)


class StateIsAlwaysReturned(Sound):
    def mix(self, inputs, state=None, return_state=False):
        return super().mix(inputs, state, True)


class StateIsShort(Sound):
    def mix(self, inputs, state=None, return_state=False):
        state = None if state is None else State(state.memory.float())
        output, end = super().mix(inputs, state, return_state)
        return output, None if end is None else State(end.memory.bfloat16())


class LooksAhead(Sound):
    def mix(self, inputs, *state):
        value = inputs.value + 0.1 * inputs.value.roll(-1, dims=1)
        return super().mix(dataclasses.replace(inputs, value=value), *state)


class ParameterIsUnused(Sound):
    def __init__(self, shape, options):
        super().__init__(shape, options)
        self.unused = nn.Parameter(torch.zeros(1))


class TensorIsNoBuffer(Sound):
    def __init__(self, shape, options):
        super().__init__(shape, options)
        del self.log_decay
        self.log_decay = torch.full((shape.query_heads,), LOG_DECAY)


class BufferIsNeverWritten(Sound):
    """It is left out of checkpoints, and reset_parameters forgets it."""

    def __init__(self, shape, options):
        super().__init__(shape, options)
        log_decay = torch.full((shape.query_heads,), LOG_DECAY)
        self.register_buffer("log_decay", log_decay, persistent=False)

    def reset_parameters(self):
        Mixer.reset_parameters(self)


padding = contract.test_padding_reaches_neither_outputs_nor_state
CAUGHT = [
    *((PaddingLeaks, padding, (side, None)) for side in ("left", "right", "inside")),
    (DocumentsLeak, contract.test_packed_documents_are_separate, ()),
    (StateIsDropped, contract.test_token_by_token_is_one_run, ()),
    (StateIsDropped, contract.test_two_segments_with_carried_state_are_one_run, (33,)),
    (StateIsDropped, contract.test_two_segments_are_one_run_in_float32, ()),
    (StateIsAlwaysReturned, contract.test_output_shape_and_dtype, ()),
    (StateIsAlwaysReturned, contract.test_the_last_segment_needs_no_state_after_it, ()),
    (StateIsShort, contract.test_low_precision_inputs_keep_a_float32_state, ()),
    (LooksAhead, contract.test_causal_by_gradient, ()),
    (ParameterIsUnused, contract.test_every_parameter_has_a_gradient_or_is_frozen, ()),
]
NAMES = ["-".join([x.__name__, check.__name__, *map(str, given)]) for x, check, given in CAUGHT]


def build(kind):
    mixer = kind(SHAPE, Options()).double()
    mixer.reset_parameters()
    return mixer


@pytest.mark.parametrize(("fault", "check", "arguments"), CAUGHT, ids=NAMES)
def test_a_planted_fault_fails_its_check(fault, check, arguments):
    check(build(Sound), SHAPE, *arguments)
    with pytest.raises(AssertionError):
        check(build(fault), SHAPE, *arguments)


def test_a_sound_mixer_loads(base, tmp_path, monkeypatch):
    monkeypatch.setitem(MIXERS, "planted", Sound)
    loading.test_a_loaded_mixer_is_the_converted_one("planted", base, tmp_path)


@pytest.mark.parametrize("fault", [TensorIsNoBuffer, BufferIsNeverWritten])
def test_a_fixed_tensor_that_no_checkpoint_holds_fails_loading(fault, base, tmp_path, monkeypatch):
    monkeypatch.setitem(MIXERS, "planted", fault)
    with pytest.raises(AssertionError):
        loading.test_a_loaded_mixer_is_the_converted_one("planted", base, tmp_path)
