"""`mamba2` in Granite's form: transformers' layer of the same weights, a start near the teacher.

Both round their norms to float32.
"""

import dataclasses

import pytest
import torch
from transformers import GraniteMoeHybridConfig
from transformers.cache_utils import DynamicCache
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridMambaLayer,
)

from supra.errors import UserError
from supra.mixers import AttentionShape, build_mixer, resolve_mixer
from supra.testing import mixer_inputs

SHAPES = {
    "pairs": AttentionShape(6, 2, 8, 8, 48, norm_eps=1e-6),
    "odd": AttentionShape(3, 3, 7, 10, 30, norm_eps=1e-5),
}
TOLERANCE = {"atol": 3e-6, "rtol": 3e-6}


def build(shape, seed=None, **options):
    """A mixer in float64, with parameters off their start if there is a seed."""
    mixer = build_mixer("mamba2", shape, {"form": "granite", **options}).double()
    mixer.reset_parameters()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for x in mixer.parameters():
            x.data.add_(0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype))
        mixer.conv.gain.uniform_(0.5, 2, generator=generator)
        mixer.magnitude.uniform_(0.5, 2, generator=generator)
    return mixer


class Attention(torch.nn.Module):
    """Random projections without biases around the mixer."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer, shape = mixer, mixer.shape
        self.sizes = {
            "value": (shape.key_heads, shape.value_size),
            "key": (shape.key_heads, shape.head_size),
            "query": (shape.query_heads, shape.head_size),
        }
        generator = torch.Generator().manual_seed(1)

        def random(*sizes):
            return torch.randn(*sizes, generator=generator).double() / shape.hidden_size**0.5

        self.rows = {name: random(*x, shape.hidden_size) for name, x in self.sizes.items()}
        self.output = random(shape.hidden_size, shape.query_heads, shape.value_size)

    def forward(self, hidden_states, state=None, mask=None):
        heads = {n: torch.einsum("btd,hkd->bthk", hidden_states, x) for n, x in self.rows.items()}
        inputs = dataclasses.replace(
            mixer_inputs(self.mixer.shape, 1),
            hidden_states=hidden_states, **heads, padding_mask=mask,
        )  # fmt: skip
        output, state = self.mixer(inputs, state, return_state=True)
        return torch.einsum("bthv,dhv->btd", output, self.output), state

    def native(self):
        """transformers' layer with these weights."""
        mixer, shape, blocks = self.mixer, self.mixer.shape, len(self.mixer.signs)
        config = GraniteMoeHybridConfig(
            hidden_size=shape.hidden_size, num_attention_heads=shape.query_heads,
            mamba_n_heads=shape.query_heads, mamba_n_groups=shape.query_heads,
            mamba_d_head=blocks * shape.value_size, mamba_d_state=blocks * shape.head_size,
            mamba_expand=blocks, mamba_chunk_size=16, num_hidden_layers=1, layer_types=["mamba"],
            rms_norm_eps=shape.norm_eps,
        )  # fmt: skip
        layer = GraniteMoeHybridMambaLayer(config, 0).double().eval()
        signs = torch.tensor(mixer.signs).double()
        groups = shape.query_heads // shape.key_heads
        repeats = {"value": groups, "key": groups, "query": 1}
        pairs = [
            torch.einsum("p,hkd->hpkd", signs, x.repeat_interleave(repeats[name], 0))
            for name, x in self.rows.items()
        ]
        weight, bias = mixer.conv.taps()
        output = self.output[:, :, None].expand(-1, -1, blocks, -1)
        layer.in_proj.weight.data = torch.cat(
            [mixer.output_gate.weight, *(x.flatten(0, 2) for x in pairs), mixer.dt.weight]
        )
        layer.conv1d.weight.data, layer.conv1d.bias.data = weight[:, None], bias
        layer.dt_bias.data, layer.A_log.data, layer.D.data = mixer.dt.bias, mixer.A_log, mixer.D
        layer.norm.weight.data = (mixer.scale * mixer.magnitude).flatten()
        layer.out_proj.weight.data = output.flatten(1)
        return layer, config


@pytest.mark.parametrize("sign_pairs", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_is_transformers_granite_layer(shape, sign_pairs):
    """Whole rows, left-padded rows, and a prefill that goes on token by token."""
    ours = Attention(build(shape, seed=2, sign_pairs=sign_pairs))
    theirs, config = ours.native()
    hidden_states = mixer_inputs(shape, 41).hidden_states
    expected = theirs(hidden_states)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(hidden_states)[0], expected, **TOLERANCE)

    mask = torch.ones(2, 41, dtype=torch.bool)
    mask[0, :7] = False
    padded = theirs(hidden_states, attention_mask=mask)
    found = ours(hidden_states, mask=mask)[0]
    torch.testing.assert_close(found[mask], padded[mask], **TOLERANCE)

    cache, state = DynamicCache(config=config), None
    for piece in hidden_states.split([29, *[1] * 12], dim=1):
        found, state = ours(piece, state)
        torch.testing.assert_close(found, theirs(piece, cache_params=cache), **TOLERANCE)
    held = cache.get_recurrent_state(0, state_idx=0)
    torch.testing.assert_close(state.memory.mT, held.double(), **TOLERANCE)


def test_starts_as_linear_attention_once_its_gate_is_open():
    """Values are so small that SiLU and the norm are linear."""
    shape = SHAPES["pairs"]
    inputs = mixer_inputs(shape, 60, seed=3)
    inputs.hidden_states[..., 0] = 5.0  # a direction in which all tokens are alike
    mixer = build(shape)
    assert not mixer(inputs)[0].any()
    target, _ = build_mixer("softmax", shape, {})(inputs)
    mixer.calibrate(inputs, target)
    output = mixer(inputs)[0].detach()
    doubled = mixer(dataclasses.replace(inputs, value=2 * inputs.value))[0]
    torch.testing.assert_close(doubled, 2 * output, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("options", [{}, {"sign_pairs": False}, {"conv_size": 1}])
def test_calibration_finds_what_made_the_target(options):
    """Shifted keys of some heads, and taps and a scale for each channel of values."""
    shape = SHAPES["pairs"]
    maker, mixer = build(shape, **options), build(shape, **options)
    inputs = mixer_inputs(shape, 200, seed=1)
    inputs.hidden_states[..., 0] = 5.0
    target, _ = build_mixer("softmax", shape, {})(inputs)
    maker.calibrate(inputs, target)
    before = maker(inputs)[0].detach()
    values, keys, _ = maker._parts(maker.conv.weight.data)
    generator = torch.Generator().manual_seed(4)
    if maker.options.conv_size > 1:
        keys[2:4, :, -2:] = torch.tensor([0.7, 0.3])
        values[..., -2:] = torch.rand(*values.shape[:2], 2, generator=generator).double()
    factors = 1 + 3 * torch.rand(6, 8, generator=generator)
    maker.scale.data.mul_(factors.repeat(1, len(maker.signs)))
    target = maker(inputs)[0].detach()
    mixer.calibrate(inputs, target)
    missing = (mixer(inputs)[0] - target).square().sum() / target.square().sum()
    assert (before - target).square().sum() > 0.3 * target.square().sum()
    assert missing < 0.1
    power = mixer.scale.square().mean(1)
    torch.testing.assert_close(power, torch.ones_like(power))


def test_slow_heads_have_a_small_decay_and_not_a_small_step():
    mixer = build(SHAPES["odd"])
    half_lives = torch.tensor([1.0, 100.0, 4096.0])
    mixer._set_half_life(half_lives)
    step = torch.nn.functional.softplus(mixer.dt.bias)
    assert step.min() > 0.015
    found = torch.exp2(-half_lives.double() * step * mixer.A_log.exp() / torch.log(torch.tensor(2)))
    torch.testing.assert_close(found, torch.full_like(found, 0.5), atol=1e-6, rtol=0)


def test_mixing_matrix_is_the_mean_over_the_channels_of_a_head():
    """Of a value that is alike in all channels, their mean is what the matrix makes of it, where
    SiLU of values is linear: half of them."""
    shape = SHAPES["pairs"]
    mixer, inputs = build(shape, seed=7), mixer_inputs(shape, 33, seed=8)
    values, _, _ = mixer._parts(mixer.conv.gain)
    values.fill_(1e-6)
    mixer.conv.bias.data.zero_()
    inputs = dataclasses.replace(inputs, value=inputs.value[..., :1].expand(-1, -1, -1, 8))
    value = inputs.value[..., 0].repeat_interleave(3, dim=2)
    mixed = torch.einsum("bhij,bjh->bih", mixer.mixing_matrix(inputs), value)
    output = mixer.in_blocks(mixer.mix(inputs)[0])
    sums = 2 * (output * torch.tensor([1, -1])[:, None]).mean((-2, -1))
    torch.testing.assert_close(1e6 * sums, 1e6 * mixed, atol=1e-4, rtol=1e-4)


def test_the_form_sets_its_options():
    _, options = resolve_mixer("mamba2", {"form": "granite", "sign_pairs": False})
    assert options == {
        "form": "granite", "conv_size": 4, "activation": "silu", "normalize": "rms", "scale": True,
        "output_gate": True, "rotary": False, "sign_pairs": False,
        "init": "teacher",
    }  # fmt: skip
    assert resolve_mixer("mamba2", options) == ("mamba2", options)
    for options, match in (
        ({"form": "granite", "rotary": True}, r"rotary \(=True\) must be False in the form 'gran"),
        ({"form": "granite", "normalize": "none"}, "normalize .* must be 'rms' .* leave normalize"),
        ({"form": "granit"}, "did you mean 'granite'"),
        ({"sign_pairs": True}, "set form to granite"),
    ):
        with pytest.raises(UserError, match=match):
            resolve_mixer("mamba2", options)
