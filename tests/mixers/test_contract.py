"""What every mixer owes, for every entry of MIXERS and PRESETS, in float64 where it can."""

import dataclasses
import itertools
import sys
import types

import accelerate
import pytest
import torch

from supra.errors import UserError
from supra.mixers import MIXERS, PRESETS, AttentionShape, Rotary, build_mixer, by_name
from supra.mixers import resolve_mixer as resolve
from supra.mixers.gates import bounded_exp
from supra.model.offload import weights_of
from supra.testing import mixer_inputs

NAMES = [*MIXERS, *PRESETS]
# those that rotate all that they read or nothing: a window is always rotated
ROTATED = [name for name in MIXERS if "rotary" in resolve(name)[1] and name != "window"]
VARIANTS = [(name, {}) for name in NAMES] + [
    ("supra", {"feature_map": "identity"}),
    ("supra", {"expansion": 2}),
    ("supra", {"qk_norm": True}),
    ("t2r_paper", {"feature_size": 7}),  # fewer features than channels; of 3, often all are 0
    ("gated", {"expansion": 3}),
    ("window", {"expansion": 2}),
    ("window", {"size": 5, "sinks": 3}),
    ("window", {"size": 5, "rotary": False}),
    ("window", {"size": 1, "sinks": 0, "decay": "none"}),
    ("mamba2", {"conv_size": 1, "output_gate": False}),
    ("mamba2", {"activation": "silu", "normalize": "rms"}),
    ("mamba2", {"form": "granite"}),
    ("h3", {"init": "published", "d_state": 6, "shift_size": 5}),
    ("h3", {"gates": False, "d_state": 6}),
    ("rwkv", {"token_shift": True, "normalize": "group", "balance_state": False}),
    ("rwkv", {"form": "qrwkv", "rank": 3}),
    ("retention", {"normalize": "rms", "output_gate": False}),
    ("supra", {"rotary": False}),
]
SHAPES = [
    AttentionShape(query_heads=6, key_heads=2, head_size=8, value_size=8, hidden_size=48),
    AttentionShape(query_heads=3, key_heads=3, head_size=10, value_size=7, hidden_size=30),
]
BOUNDED = [  # mixers that have exponentials of parameters
    name for name, mixer in MIXERS.items() if hasattr(sys.modules[mixer.__module__], "bounded_exp")
]
BATCH, TOKENS = 2, 70  # 70: one chunk of 64 and an odd rest


def rotate_half(query, key, cos, sin, unsqueeze_dim):
    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return query * cos + turned(query) * sin, key * cos + turned(key) * sin


def rotary(positions, size):
    """RoPE over the first half of each head: partial rotary is the harder case."""
    size = size // 2
    angles = positions[..., None] * 10.0 ** -torch.arange(0, 1, 2 / size, dtype=torch.float64)
    angles = torch.cat([angles, angles], dim=-1)
    return Rotary(angles.cos(), angles.sin(), rotate_half, angles.shape[-1])


def make_inputs(shape, seed=0, tokens=TOKENS):
    angles = rotary(torch.arange(tokens)[None], shape.head_size)
    return mixer_inputs(shape, tokens, seed=seed, rotary=angles)


def in_float32(inputs):
    cos, sin = (x.float() for x in (inputs.rotary.cos, inputs.rotary.sin))
    names = ("hidden_states", "query", "key", "value")
    return dataclasses.replace(
        inputs,
        **{name: getattr(inputs, name).float() for name in names},
        rotary=dataclasses.replace(inputs.rotary, cos=cos, sin=sin),
    )


def part(inputs, start, end, rows=slice(None), positions=None):
    """Tokens start … end of some rows; their positions stay theirs unless given."""
    cut = {
        name: getattr(inputs, name)[rows, start:end]
        for name in ("hidden_states", "query", "key", "value")
    }
    positions = torch.arange(start, end) if positions is None else positions
    mask = None if inputs.padding_mask is None else inputs.padding_mask[rows, start:end]
    size = inputs.query.shape[-1]
    return dataclasses.replace(
        inputs, **cut, rotary=rotary(positions[None], size), padding_mask=mask
    )


@pytest.fixture(params=SHAPES, ids=["grouped", "odd"])
def shape(request):
    return request.param


@pytest.fixture(params=VARIANTS, ids=[f"{name}{options or ''}" for name, options in VARIANTS])
def mixer(request, shape):
    """As after some training: at the start, a convolution or a gate may be the identity."""
    name, options = request.param
    mixer = build_mixer(name, shape, options).double()
    mixer.reset_parameters()
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += 0.1 * noise
    return mixer


def close(actual, expected, tolerance=1e-6):
    """Decays are float32 whatever the inputs are, which leaves 1e-7 of each weight."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_output_shape_and_dtype(mixer, shape):
    inputs = make_inputs(shape)
    output, state = mixer(inputs)
    assert output.shape == (BATCH, TOKENS, shape.query_heads, shape.value_size)
    assert output.dtype == inputs.value.dtype
    assert state is None


def test_token_by_token_is_one_run(mixer, shape):
    inputs = make_inputs(shape)
    expected, _ = mixer(inputs)
    state, outputs = None, []
    for token in range(TOKENS):
        output, state = mixer(part(inputs, token, token + 1), state, return_state=True)
        outputs.append(output)
    close(torch.cat(outputs, dim=1), expected)


@torch.no_grad()
def test_steps_without_gradients_are_one_run(mixer, shape):
    """Mixers may have a form of their own for such a step."""
    inputs = make_inputs(shape)
    expected, end = mixer(inputs, return_state=True)
    first, state = mixer(part(inputs, 0, 61), return_state=True)
    outputs = [first]
    for token in range(61, TOKENS):
        output, state = mixer(part(inputs, token, token + 1), state, return_state=True)
        outputs.append(output)
    close(torch.cat(outputs, dim=1), expected)
    for ours, theirs in zip(state, end, strict=True):
        assert ours is theirs is None or close(ours, theirs) is None


@pytest.mark.parametrize("cut", [1, 33, 64])
def test_two_segments_with_carried_state_are_one_run(mixer, shape, cut):
    inputs = make_inputs(shape)
    expected, end = mixer(inputs, return_state=True)
    first, state = mixer(part(inputs, 0, cut), return_state=True)
    second, state = mixer(part(inputs, cut, TOKENS), state, return_state=True)
    close(torch.cat([first, second], dim=1), expected)
    for ours, theirs in zip(state, end, strict=True):
        assert ours is theirs is None or close(ours, theirs) is None


def test_the_last_segment_needs_no_state_after_it(mixer, shape):
    inputs = make_inputs(shape)
    _, state = mixer(part(inputs, 0, 33), return_state=True)
    expected, _ = mixer(part(inputs, 33, TOKENS), state, return_state=True)
    output, end = mixer(part(inputs, 33, TOKENS), state)
    assert end is None
    close(output, expected)


@torch.no_grad()
def test_two_segments_are_one_run_in_float32(mixer, shape):
    mixer, inputs = mixer.float(), in_float32(make_inputs(shape))
    names = ("hidden_states", "query", "key", "value")
    cos, sin = inputs.rotary.cos, inputs.rotary.sin
    expected, _ = mixer(inputs)
    first, state = mixer(inputs.first(33), return_state=True)
    rest = dataclasses.replace(
        inputs,
        **{name: getattr(inputs, name)[:, 33:] for name in names},
        rotary=dataclasses.replace(inputs.rotary, cos=cos[:, 33:], sin=sin[:, 33:]),
    )
    second, _ = mixer(rest, state, return_state=True)
    error = torch.cat([first, second], dim=1) - expected
    assert error.square().mean().sqrt() < 1e-6 * expected.square().mean().sqrt()


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_reaches_neither_outputs_nor_state(mixer, shape, side, window):
    """A row with 9 padded tokens against its tokens alone; then both are continued twice, the first
    time after a padding of 8."""
    inputs = dataclasses.replace(make_inputs(shape), sliding_window=window)
    pads = {"left": range(9), "right": range(61, 70), "inside": range(30, 39)}[side]
    kept = torch.tensor([token not in pads for token in range(TOKENS)])
    together, state = mixer(one_row_padded(inputs, kept), return_state=True)
    alone = row_alone(inputs, kept)
    expected, expected_state = mixer(alone, return_state=True)
    close(together[:1][:, kept], expected)
    for seed, padding in ((5, 8), (6, 0)):
        later = dataclasses.replace(make_inputs(shape, seed, padding + 4), sliding_window=window)
        kept = torch.arange(padding + 4) >= padding
        more, state = mixer(one_row_padded(later, kept), state, return_state=True)
        expected, expected_state = mixer(row_alone(later, kept), expected_state, return_state=True)
        close(more[:1][:, kept], expected)


def one_row_padded(inputs, kept):
    """With padding of large values where the first row keeps nothing."""
    value = inputs.value.clone()
    value[0, ~kept] = 1e3
    mask = torch.stack([kept, torch.ones_like(kept)])
    return dataclasses.replace(inputs, value=value, padding_mask=mask)


def row_alone(inputs, kept):
    """The kept tokens of the first row, at their positions."""
    names = ("hidden_states", "query", "key", "value")
    cut = {name: getattr(inputs, name)[:1][:, kept] for name in names}
    angles = rotary(torch.arange(len(kept))[kept][None], inputs.query.shape[-1])
    return dataclasses.replace(inputs, **cut, rotary=angles)


@pytest.mark.parametrize("value", [-1e4, -100.0, 50.0, 100.0, 1e4])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_parameter_that_ran_away_leaves_all_numbers_finite(name, options, value):
    mixer = build_mixer(name, SHAPES[0], options)
    mixer.reset_parameters()
    inputs = in_float32(make_inputs(SHAPES[0], tokens=12))
    loud = dataclasses.replace(inputs, hidden_states=1e4 * inputs.hidden_states)
    tensors = [(n, x) for n, x in mixer.named_parameters()]
    tensors += [(n, x) for n, x in mixer.named_buffers() if n == "log_slope"]
    for changed, tensor in tensors:
        start = tensor.data.clone()
        tensor.data.fill_(value)
        for given in (inputs, loud):
            output, state = mixer(given, return_state=True)
            assert all(x is None or x.isfinite().all() for x in (output, *state)), changed
            leaves = list(mixer.parameters())
            gradients = torch.autograd.grad(output.mean(), leaves, materialize_grads=True)
            assert all(x.isfinite().all() for x in gradients), changed
        tensor.data.copy_(start)


def test_bounded_exponents_are_exponents_within_the_bound():
    x = torch.cat([torch.linspace(-200, 20, 5001), torch.tensor([20.1, 50.0, 1e4, 1e30])])
    x.requires_grad_()
    found = bounded_exp(x)
    expected = x.clamp(max=20).exp()
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, expected), "beyond the bound, that at the bound"


@pytest.mark.parametrize("size", [-30.0, -3.0, 1.0, 19.9])
@pytest.mark.parametrize("name", BOUNDED)
def test_values_within_the_bound_are_as_without_it(name, size, monkeypatch):
    mixer = build_mixer(name, SHAPES[0], {})
    mixer.reset_parameters()
    names = {n: n.split(".")[-1] for n, _ in mixer.named_parameters()}
    exponents = [  # the names of Mamba-2 and RWKV, and our own
        mixer.get_parameter(n) for n, x in names.items() if x in ("A_log", "w0") or x[:4] == "log_"
    ]
    for parameter in exponents:
        parameter.data.fill_(size)
    inputs = in_float32(make_inputs(SHAPES[0], tokens=12))

    def numbers():
        output, _ = mixer(inputs)
        leaves = list(mixer.parameters())
        return output, *torch.autograd.grad(output.sum(), leaves, materialize_grads=True)

    found = numbers()
    monkeypatch.setattr(sys.modules[type(mixer).__module__], "bounded_exp", torch.exp)
    assert exponents and all(map(torch.equal, found, numbers()))


@torch.no_grad()
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_offloading_changes_nothing(mixer, shape, place, tmp_path):
    """Offloaded parameters exist only inside their own module's forward. A step that reads them
    outside gives way to another form, whose sums round differently."""
    inputs = make_inputs(shape, tokens=30)

    def outputs():
        first, state = mixer(part(inputs, 0, 29), return_state=True)
        with weights_of(mixer):
            matrix = mixer.mixing_matrix(inputs)
        return first, mixer(part(inputs, 29, 30), state)[0], mixer(inputs)[0], matrix

    expected, device = outputs(), torch.device("cpu")
    model = torch.nn.ModuleList([mixer, torch.nn.Linear(1, 1)])  # softmax has nothing to offload
    if place == "memory":
        accelerate.cpu_offload(model, device)
    else:
        accelerate.disk_offload(model, tmp_path, device)
    assert all(x.is_meta for x in mixer.parameters())
    first, step, whole, matrix = outputs()
    for found, wanted in ((first, expected[0]), (whole, expected[2]), (matrix, expected[3])):
        assert torch.equal(found, wanted)
    close(step, expected[1], tolerance=1e-12)


def test_packed_documents_are_separate(mixer, shape):
    lengths = (1, 40, 29)
    positions = torch.cat([torch.arange(n) for n in lengths])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = dataclasses.replace(
        make_inputs(shape),
        rotary=rotary(positions[None], shape.head_size),
        cu_seqlens=torch.cat([bounds, TOKENS + bounds[1:]]).to(torch.int32),
    )
    packed, _ = mixer(inputs)
    separate = dataclasses.replace(inputs, cu_seqlens=None)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        alone, _ = mixer(part(separate, start, end, positions=torch.arange(end - start)))
        close(packed[:, start:end], alone)


@pytest.mark.parametrize("name", ROTATED)
def test_without_rotary_the_rotation_is_not_seen(name, shape):
    inputs = make_inputs(shape, tokens=20)
    plain = dataclasses.replace(inputs, rotary=None)
    mixers = [build_mixer(name, shape, {"rotary": x}).double() for x in (False, True)]
    for mixer in mixers:
        mixer.reset_parameters()
    without, with_it = mixers
    without.load_state_dict(with_it.state_dict())
    for run in (lambda mixer, x: mixer(x)[0], lambda mixer, x: mixer.mixing_matrix(x)):
        found, expected = run(without, inputs), run(with_it, plain)
        assert torch.equal(found, expected)
        assert not torch.allclose(found, run(with_it, inputs))


def test_first_rows_are_the_rows_alone():
    mixer = build_mixer("mamba2", SHAPES[0], {}).double()
    mixer.reset_parameters()
    inputs = dataclasses.replace(
        make_inputs(SHAPES[0]), cu_seqlens=torch.tensor([0, 9, 70, 101, 140], dtype=torch.int32)
    )
    alone = inputs.first_rows(1)
    assert alone.cu_seqlens.tolist() == [0, 9, 70]
    close(mixer(alone)[0], mixer(inputs)[0][:1])


def test_causal_by_gradient(mixer, shape):
    inputs = make_inputs(shape)
    leaves = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    output, _ = mixer(inputs)
    gradients = torch.autograd.grad(output[:, 41].sum(), leaves, materialize_grads=True)
    assert gradients[-1][:, :41].abs().sum() > 0
    for gradient in gradients:
        assert gradient[:, 42:].abs().max() == 0


def test_every_parameter_has_a_gradient_or_is_frozen(mixer, shape):
    inputs = make_inputs(shape)
    inputs.value.requires_grad_()
    mixer(inputs)[0].pow(3).sum().backward()
    for name, parameter in mixer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_low_precision_inputs_keep_a_float32_state(mixer, shape):
    inputs = make_inputs(shape)
    fields = ("hidden_states", "query", "key", "value")
    low = {name: getattr(inputs, name).bfloat16() for name in fields}
    exact = {name: x.double() for name, x in low.items()}
    expected, _ = mixer(dataclasses.replace(inputs, **exact))
    angles = inputs.rotary
    angles = dataclasses.replace(angles, cos=angles.cos.bfloat16(), sin=angles.sin.bfloat16())
    output, state = mixer.float()(
        dataclasses.replace(inputs, **low, rotary=angles), return_state=True
    )
    assert output.dtype == torch.bfloat16
    assert type(mixer).name == "softmax" or state.memory.dtype == torch.float32
    error = (output.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error < 0.02, "bfloat16 has 8 bits: 0.4% an operation"


def test_a_state_of_another_mixer_is_refused():
    mixers = [build_mixer(name, SHAPES[0], {}).double() for name in MIXERS]
    inputs = make_inputs(SHAPES[0], tokens=3)
    states = [mixer(inputs, return_state=True)[1] for mixer in mixers]
    for mixer, state in itertools.product(mixers, states):
        if type(state) is not mixer.State:
            with pytest.raises(UserError, match=f"{mixer.name} keeps .* or by another model"):
                mixer(inputs, state)


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "softmax"])
def test_calibration_on_what_is_not_finite_is_refused(name):
    mixer, inputs = build_mixer(name, SHAPES[0], {}).double(), make_inputs(SHAPES[0])
    mixer.reset_parameters()
    target, _ = build_mixer("softmax", SHAPES[0], {})(inputs)
    target[1, 7, 2, 3] = torch.nan
    with pytest.raises(UserError, match=f"calibration of {name}: .* not finite"):
        mixer.calibrate(inputs, target)


def test_unknown_names_are_refused_with_the_nearest(monkeypatch):
    with pytest.raises(UserError, match="did you mean 'supra'"):
        resolve("supr")
    with pytest.raises(UserError, match="did you mean 'feature_map'"):
        resolve("supra", {"featuremap": "identity"})
    with pytest.raises(UserError, match="hedgehog, identity, mixed_relu"):
        resolve("supra", {"feature_map": "none"})
    with pytest.raises(UserError, match=r"option of mixer 'softmax' 'scale' \(known: rotary"):
        resolve("softmax", {"scale": True})
    bare = dataclasses.make_dataclass("Bare", [])
    monkeypatch.setitem(MIXERS, "bare", types.SimpleNamespace(Options=bare))
    with pytest.raises(UserError, match="has no options"):
        resolve("bare", {"scale": True})


def test_a_name_that_is_taken_twice_is_refused():
    for entries, taken in (([*MIXERS.values(), MIXERS["supra"]], ()), (PRESETS.values(), ["t2r"])):
        with pytest.raises(ValueError, match=r"name \(='(supra|t2r)'\) is in use already"):
            by_name(entries, taken)
    assert by_name(MIXERS.values(), PRESETS) == MIXERS
