"""Policies on states: the same in prefill, decode, padding and packing; windows are exact."""

import math
from dataclasses import replace

import pytest
import torch

from supra.errors import UserError
from supra.mixers import MIXERS, AttentionShape, build_mixer, resolve_mixer
from supra.mixers.state_policy import StatePolicy, clamp_factors, with_past
from supra.testing import mixer_inputs

UNGATED = {"output_gate": False}  # which is float32 whatever its inputs are
OPTIONS = {  # without taps over several tokens
    "mamba2": {"conv_size": 1},
    "h3": {"head_size": 1, "shift_size": 1, "d_state": 4},
    "window": {"size": 4, "sinks": 2},
}
PRESETS = ["gated", "hedgehog"]  # decays by token, and none
SHAPE = AttentionShape(4, 2, 6, 6, 12)


def take(field):
    """The mixers with one state alone, on which this field of a policy acts."""
    kinds = {name: x for name, x in MIXERS.items() if x.recurrent and not x.branches}
    return [*(name for name, x in kinds.items() if field not in x.refuses), *PRESETS]


SUMS, NORMED = take("window"), take("norm")
POLICIES = {
    "scaled": StatePolicy(decay_scale=0.9, insert_scale=0.5),
    "window": StatePolicy(window=9),
    "window, scaled": StatePolicy(decay_scale=0.95, window=30),
    "norm": StatePolicy(norm=0.4, norm_every=7),
    "norm, as published": StatePolicy(norm=0.4, norm_every=1),
}


def make(name, options=None, seed=0):
    """A mixer in float64 with random parameters, so that decays differ by token and head."""
    ungated = UNGATED if "output_gate" in resolve_mixer(name)[1] else {}
    mixer = build_mixer(name, SHAPE, OPTIONS.get(name, {}) | ungated | (options or {}))
    mixer.reset_parameters()
    generator = torch.Generator().manual_seed(seed)
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return mixer.double().requires_grad_(False)


def run_in_pieces(mixer, inputs, cuts):
    state, outputs = None, []
    for begin, end in zip([0, *cuts], [*cuts, inputs.query.shape[1]], strict=True):
        names = ("hidden_states", "query", "key", "value")
        piece = {name: getattr(inputs, name)[:, begin:end] for name in names}
        if inputs.padding_mask is not None:
            piece["padding_mask"] = inputs.padding_mask[:, begin:end]
        output, state = mixer(replace(inputs, **piece), state, return_state=True)
        outputs.append(output)
    return torch.cat(outputs, dim=1), state


def assert_close(found, expected, tolerance=1e-10):
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", [*SUMS, "window"])
def test_pieces_padding_and_packing(name, policy):
    """Token by token, in pieces, padded and packed: what one row alone gives in one call."""
    mixer = make(name)
    plain = mixer(mixer_inputs(SHAPE, 61))[0]
    mixer.set_policy(policy, 0)
    inputs = mixer_inputs(SHAPE, 61)
    whole, end = mixer(inputs, return_state=True)
    assert not torch.allclose(whole, plain)
    for cuts in ([17, 18, 40], range(1, 61)):
        found, state = run_in_pieces(mixer, inputs, list(cuts))
        assert_close(found, whole)
        for x, y in zip(state, end, strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.allclose(x.double(), y.double(), atol=1e-10)
    # the second row's padding lies in its middle, as after a batch of turns of a dialogue
    mask = torch.ones(2, 61, dtype=torch.bool)
    mask[0, :20] = mask[1, 30:45] = False
    padded = replace(inputs, padding_mask=mask)
    for cuts in ([], [25, 38]):
        found, _ = run_in_pieces(mixer, padded, cuts)
        for row in range(2):
            names = ("hidden_states", "query", "key", "value")
            alone = {x: getattr(inputs, x)[row, mask[row]][None] for x in names}
            assert_close(found[row, mask[row]][None], mixer(replace(inputs, **alone))[0])
    packed = replace(inputs, cu_seqlens=torch.tensor([0, 61, 80, 80, 122], dtype=torch.int32))
    found = mixer(packed)[0].flatten(0, 1)
    for begin, end in ((0, 61), (61, 80), (80, 122)):
        alone = {x: getattr(inputs, x).flatten(0, 1)[None, begin:end] for x in names}
        assert_close(found[None, begin:end], mixer(replace(inputs, **alone))[0])


@pytest.mark.parametrize("size", [1, 13])
@pytest.mark.parametrize("name", SUMS)
def test_a_window_is_the_last_tokens(name, size):
    """By state difference = by running on the last r tokens, in one layer."""
    mixer, inputs = make(name), mixer_inputs(SHAPE, 70)
    names = ("hidden_states", "query", "key", "value")
    last = {x: getattr(inputs, x)[:, 70 - size :] for x in names}
    expected = mixer(replace(inputs, **last), return_state=True)
    mixer.set_policy(StatePolicy(window=size), 0)
    output, end = mixer(inputs, return_state=True)
    assert_close(output[:, -1:], expected[0][:, -1:])
    if name != "h3":  # which holds the sums over all and those of r tokens ago
        assert_close(end.memory, expected[1].memory)


def test_a_window_over_a_reset():
    """Where a decay of 0 lies in the window, nothing of before is left to be taken out."""
    mixer, inputs = make("gated"), mixer_inputs(SHAPE, 40)
    inputs.hidden_states[:, 20] = -1e4 * mixer.decay_gate.weight.sum(0).sign()
    expected = mixer(inputs)[0]
    mixer.set_policy(StatePolicy(window=30), 0)
    assert torch.isfinite(expected).all()
    assert_close(mixer(inputs)[0][:, :30], expected[:, :30])


@pytest.mark.parametrize("name", NORMED)
def test_neutral_policies_change_no_bit(name):
    mixer, inputs = make(name), mixer_inputs(SHAPE, 50)
    expected = mixer(inputs)[0]
    mixer.set_policy(StatePolicy(decay_scale=1.0, insert_scale=1.0), 0)
    assert torch.equal(mixer(inputs)[0], expected)
    mixer.set_policy(StatePolicy(norm=math.inf, norm_every=64), 0)
    assert torch.equal(mixer(inputs)[0], expected)


@pytest.mark.parametrize("name", NORMED)
def test_norms_stay_below_their_thresholds(name):
    mixer = make(name)
    free = mixer(mixer_inputs(SHAPE, 48), return_state=True)[1].memory
    largest = free.reshape(2, 4 if free.shape[1] % 4 == 0 else 2, -1).norm(dim=-1).amin(0) / 2
    mixer.set_policy(StatePolicy(norm=(tuple(largest.tolist()),), norm_every=1), 0)
    memory = mixer(mixer_inputs(SHAPE, 48), return_state=True)[1].memory
    norms = memory.reshape(2, len(largest), -1).norm(dim=-1)
    assert (norms <= largest * (1 + 1e-6)).all()
    assert (norms >= largest * 0.3).all()


def test_decay_scale_multiplies_every_decay():
    """0.9 on a fixed decay of 0.8 is a decay of 0.72."""
    mixer, inputs = make("supra", {"decay": "fixed", "normalize": "none"}), mixer_inputs(SHAPE, 30)
    mixer.log_slope.fill_(math.log(-math.log(0.72)))
    expected = mixer(inputs)[0]
    mixer.log_slope.fill_(math.log(-math.log(0.8)))
    seen = []
    mixer.watch = seen.append
    mixer.set_policy(StatePolicy(decay_scale=0.9), 0)
    assert_close(mixer(inputs)[0], expected, 1e-6)  # γ is float32
    assert_close(seen[0].exp(), torch.full((4,), 0.72), 1e-6)


def test_insert_scale_scales_an_unnormalised_output():
    mixer, inputs = make("rwkv"), mixer_inputs(SHAPE, 30)
    expected = mixer(inputs)[0] / 4
    mixer.set_policy(StatePolicy(insert_scale=0.25), 0)
    assert_close(mixer(inputs)[0], expected)


def test_16_bits_take_out_what_was_written():
    """A window over bf16 inputs forgets as exactly as over their float32 values."""
    mixer = make("mamba2").float()
    mixer.set_policy(StatePolicy(window=8), 0)
    inputs = mixer_inputs(SHAPE, 400)
    names = ("hidden_states", "query", "key", "value")
    narrow = {x: getattr(inputs, x).to(torch.bfloat16) for x in names}
    long = mixer(replace(inputs, **narrow), return_state=True)[1].memory
    tail = {x: y[:, -8:] for x, y in narrow.items()}
    short = mixer(replace(inputs, **tail), return_state=True)[1].memory
    assert_close(long, short, 1e-5)


def test_gradients_pass_through_a_window():
    mixer, inputs = make("gated"), mixer_inputs(SHAPE, 12)
    mixer.set_policy(StatePolicy(window=5), 0)
    value = inputs.value.requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(inputs)[0][:, -1].sum(), value)
    assert gradient[:, 7:].abs().amin() > 0
    assert gradient[:, :7].abs().max() < 1e-12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decay_scale": 1.5}, r"decay_scale \(=1.5\) must be > 0 and <= 1"),
        ({"insert_scale": 0}, r"insert_scale \(=0\) must be > 0 and <= 1"),
        ({"norm": -1.0}, r"norm \(=-1.0\) must be positive"),
        ({"norm": [[1.0], [0.0]]}, r"norm \(=0.0\) must be positive"),
        ({"norm": "big"}, r"norm \(='big'\) must be positive"),
        ({"norm_every": 0}, r"norm_every \(=0\) must be a whole number >= 1"),
        ({"window": 0}, r"window \(=0\) must be a whole number from 1 to 131072"),
        ({"window": 131073}, r"window \(=131073\) must be a whole number from 1 to 131072"),
        ({"window": 4, "norm": 1.0}, r"window \(=4\) with norm"),
        ({"decay": 0.5}, r"'decay' is none of decay_scale, insert_scale, norm"),
    ],
)
def test_what_is_no_policy(fields, message):
    with pytest.raises(UserError, match=message):
        StatePolicy.from_dict(fields)


def test_what_cannot_act():
    mixer = make("gated_delta")
    for policy in (StatePolicy(window=4), StatePolicy(insert_scale=0.5)):
        with pytest.raises(UserError, match=r"cannot act on layer 3 \(gated_delta\): "):
            mixer.set_policy(policy, 3)
    attention = build_mixer("softmax", SHAPE, {})
    attention.set_policy(StatePolicy(window=4), 0)  # it has no state to bound
    assert attention.policy is None
    with pytest.raises(UserError, match=r"thresholds for 1 layers, and there is a layer 1"):
        mixer.set_policy(StatePolicy(norm=[[1.0]]), 1)
    with pytest.raises(UserError, match="3 thresholds for a layer of 4 heads"):
        mixer.set_policy(StatePolicy(norm=[[1.0, 2.0, 3.0]]), 0)
    mixer.set_policy(StatePolicy(norm=[[1.0] * 8]), 0)  # h3's memory may have so many
    with pytest.raises(UserError, match="8 thresholds for a layer of 4 heads"):
        mixer(mixer_inputs(SHAPE, 64))


def test_a_state_of_another_policy():
    mixer, inputs = make("supra"), mixer_inputs(SHAPE, 5)
    _, state = mixer(inputs, return_state=True)
    mixer.set_policy(StatePolicy(window=4), 0)
    with pytest.raises(UserError, match="made under another state_policy"):
        mixer(inputs, state)
    _, state = mixer(inputs, return_state=True)
    assert type(state) is with_past(mixer.State)
    mixer.set_policy(StatePolicy(window=6), 0)
    with pytest.raises(UserError, match="made with a window of 4 tokens, not 6"):
        mixer(inputs, state)
    mixer.set_policy(None, 0)
    with pytest.raises(UserError, match="made under another state_policy"):
        mixer(inputs, state)


def test_a_head_of_nothing_is_left_alone():
    mixer = make("supra")
    mixer.set_policy(StatePolicy(norm=1.0), 0)
    memory = torch.zeros(1, 2, 3, 3)
    memory[0, 1] = 2
    factors = clamp_factors(mixer.policy, memory)
    assert factors.tolist() == [[1.0, pytest.approx(1 / 6)]]
