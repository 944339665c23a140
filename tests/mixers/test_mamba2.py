"""The `mamba2` mixer is transformers' Mamba-2 of the same weights, and starts near its teacher."""

import dataclasses

import pytest
import torch
from transformers import Mamba2Config
from transformers.cache_utils import DynamicCache
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, MambaRMSNormGated

from supra.errors import UserError
from supra.mixers import AttentionShape, build_mixer
from supra.testing import mixer_inputs

HEADS, STATE, HEAD, HIDDEN = 4, 10, 8, 32
PUBLISHED = {"activation": "silu", "normalize": "rms"}
GROUPED = AttentionShape(query_heads=6, key_heads=2, head_size=8, value_size=7, hidden_size=48)


def published(groups):
    """transformers' mixer with random weights, B and C shared by the heads of a group."""
    config = Mamba2Config(
        num_heads=HEADS, head_dim=HEAD, hidden_size=HIDDEN, expand=1, state_size=STATE,
        n_groups=groups, chunk_size=16, num_hidden_layers=1,
    )  # fmt: skip
    torch.manual_seed(groups)
    theirs = Mamba2Mixer(config, 0).eval()
    theirs.norm = MambaRMSNormGated(HIDDEN, group_size=HEAD, eps=1e-5)
    for parameter in theirs.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return theirs, config


class Ours(torch.nn.Module):
    """Our mixer between their projections."""

    def __init__(self, theirs):
        super().__init__()
        self.theirs, self.repeats = theirs, HEADS // theirs.n_groups
        shape = AttentionShape(HEADS, HEADS, STATE, HEAD, HIDDEN)
        self.mixer = mixer = build_mixer("mamba2", shape, PUBLISHED)
        mixer.reset_parameters()
        gate, *_, dt = self._split(theirs.in_proj.weight)
        for ours, given in (
            (mixer.output_gate.weight, gate),
            (mixer.output_gate.bias, torch.zeros(HIDDEN)),
            (mixer.dt.weight, dt),
            (mixer.dt.bias, theirs.dt_bias),
            (mixer.conv.weight, self._spread(theirs.conv1d.weight[:, 0])),
            (mixer.conv.bias, self._spread(theirs.conv1d.bias)),
            (mixer.A_log, theirs.A_log),
            (mixer.D, theirs.D),
            (mixer.scale, theirs.norm.weight.view(HEADS, HEAD)),
        ):
            ours.data.copy_(given)

    def _split(self, rows):
        shared = self.theirs.n_groups * STATE
        return rows.split([HIDDEN, HIDDEN, shared, shared, HEADS])

    def _spread(self, rows):
        """Rows for x, B and C, with those of B and C repeated for the heads of a group."""
        shared = self.theirs.n_groups * STATE
        x, *rest = rows.split([HIDDEN, shared, shared])
        spread = [y.unflatten(0, (-1, STATE)).repeat_interleave(self.repeats, 0) for y in rest]
        return torch.cat([x, *(y.flatten(0, 1) for y in spread)])

    def forward(self, hidden, state=None, mask=None):
        projected = torch.cat(self._split(self.theirs.in_proj.weight)[1:4])
        rows = hidden @ self._spread(projected).T
        value, key, query = rows.split([HIDDEN, HEADS * STATE, HEADS * STATE], dim=-1)
        inputs = dataclasses.replace(
            mixer_inputs(self.mixer.shape, 1),
            hidden_states=hidden,
            **{
                n: x.unflatten(-1, (HEADS, -1))
                for n, x in (("query", query), ("key", key), ("value", value))
            },
            scaling=1.0,
            padding_mask=mask,
        )
        output, state = self.mixer(inputs, state, return_state=True)
        return self.theirs.out_proj(output.flatten(2)), state


@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_is_transformers_mamba2(groups):
    """Whole rows, left-padded rows, and a prefill that goes on token by token."""
    theirs, config = published(groups)
    ours = Ours(theirs)
    hidden = torch.randn(2, 41, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = theirs(hidden)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(hidden)[0], expected, atol=2e-6, rtol=2e-5)

    mask = torch.ones(2, 41, dtype=torch.bool)
    mask[0, :7] = False
    padded = theirs(hidden, attention_mask=mask)
    found = ours(hidden, mask=mask)[0]
    torch.testing.assert_close(found[mask], padded[mask], atol=2e-6, rtol=2e-5)

    cache, state = DynamicCache(config=config), None
    for piece in hidden.split([29, *[1] * 12], dim=1):
        found, state = ours(piece, state)
        expected = theirs(piece, cache_params=cache)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)
    theirs_held = cache.get_recurrent_state(0, state_idx=0)
    torch.testing.assert_close(state.memory.mT, theirs_held, atol=2e-6, rtol=2e-5)


def build(options=None, shape=GROUPED, seed=None):
    """A mixer in float64, with parameters off their start if there is a seed."""
    mixer = build_mixer("mamba2", shape, options or {}).double()
    mixer.reset_parameters()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for x in mixer.parameters():
            x.data.add_(0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype))
    return mixer


def quadratic(inputs, half_lives):
    """scaling · Σ Δ exp(−Δ (i − j)) (qᵢ·kⱼ) vⱼ with Δ = ln 2 / half-life."""
    step = torch.log(torch.tensor(2.0)).double() / half_lives.double()
    distance = torch.arange(inputs.query.shape[1])
    distance = distance[:, None] - distance
    groups = inputs.query.shape[2] // inputs.key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2) for x in (inputs.key, inputs.value))
    weights = (step * torch.exp(-step * distance[..., None])).permute(2, 0, 1).tril()
    scores = inputs.scaling * torch.einsum("bihk,bjhk->bhij", inputs.query, key)
    return torch.einsum("bhij,bjhv->bihv", scores * weights, value)


def test_starts_as_linear_attention_with_the_teachers_weights():
    inputs = mixer_inputs(GROUPED, 45, seed=2)
    half_lives = 4 * 512 ** (torch.arange(6) / 5)
    expected = quadratic(inputs, half_lives)
    torch.testing.assert_close(build()(inputs)[0], expected, atol=1e-6, rtol=1e-6)


def test_weights_of_a_start_sum_to_about_one():
    """Where all scores are one, what a decay forgets is what is written."""
    inputs = mixer_inputs(GROUPED, 400, seed=2)
    ones = {"query": inputs.query * 0 + 1, "key": inputs.key * 0 + 1, "scaling": 1 / 8}
    mixer = build()
    mixer._set_half_life(torch.tensor([4.0, 8, 16, 24, 32, 40]))
    output = mixer.mix(dataclasses.replace(inputs, **ones, value=inputs.value * 0 + 1))[0]
    torch.testing.assert_close(output[:, -1], torch.ones_like(output[:, -1]), atol=0.1, rtol=0)


def test_shared_heads_are_repeated_heads():
    """x and B of a key head serve its query heads; each of these has its own Δ, A, D and gate."""
    grouped, inputs = build(seed=3), mixer_inputs(GROUPED, 37, seed=4)
    shape = dataclasses.replace(GROUPED, key_heads=6)
    alone = build(shape=shape)
    alone.load_state_dict({
        name: _repeat(x) if name.startswith("conv.") else x
        for name, x in grouped.state_dict().items()
    })  # fmt: skip
    wide = {n: getattr(inputs, n).repeat_interleave(3, dim=2) for n in ("key", "value")}
    expected = alone(dataclasses.replace(inputs, **wide))[0]
    torch.testing.assert_close(grouped(inputs)[0], expected, atol=1e-12, rtol=1e-12)


def _repeat(rows):
    x, key, query = rows.split([2 * 7, 2 * 8, 6 * 8])
    x, key = (y.unflatten(0, (2, -1)).repeat_interleave(3, 0).flatten(0, 1) for y in (x, key))
    return torch.cat([x, key, query])


def test_a_decoding_step_leaves_the_state_before_it_alone():
    mixer, inputs = build(seed=5), mixer_inputs(GROUPED, 12, seed=6)
    with torch.no_grad():
        expected, end = mixer(inputs, return_state=True)
        _, state = mixer(inputs.first(11), return_state=True)
        kept = [x.clone() for x in state]
        names = ("hidden_states", "query", "key", "value")
        last = dataclasses.replace(inputs, **{n: getattr(inputs, n)[:, 11:] for n in names})
        output, after = mixer(last, state, return_state=True)
    torch.testing.assert_close(output, expected[:, 11:], atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(after, end, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(kept, state, strict=True))


def test_mixing_matrix_is_the_mean_over_the_channels_of_a_head():
    """Of a value that is alike in all channels, their mean is what the matrix makes of it."""
    mixer, inputs = build(seed=7), mixer_inputs(GROUPED, 33, seed=8)
    mixer.conv.bias.data.zero_()
    inputs = dataclasses.replace(inputs, value=inputs.value[..., :1].expand(-1, -1, -1, 7))
    value = inputs.value[..., 0].repeat_interleave(3, dim=2)
    mixed = torch.einsum("bhij,bjh->bih", mixer.mixing_matrix(inputs), value)
    torch.testing.assert_close(mixer.mix(inputs)[0].mean(-1), mixed, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"conv_size": 1}, {"activation": "silu"}])
def test_calibration_finds_what_made_the_target(options):
    """Half-lives, biases of C and skips per head, and a scale."""
    maker, mixer, inputs = build(options), build(options), mixer_inputs(GROUPED, 200, seed=1)
    query, key = inputs.magnitudes()
    maker._set_half_life(torch.tensor([1.0, 4, 16, 64, 256, 16]))
    maker.D.data.copy_(torch.tensor([0.3, 0, -0.3, 0.1, 1, 0]))
    biases = torch.tensor([0, 0.25, 0.5, 1, 2, 0]) * query, 0.5 * key
    maker.conv.bias.data[2 * 7 :] = torch.cat([x.repeat_interleave(8) for x in biases[::-1]])
    target = 3 * maker(inputs)[0].detach()
    before = (mixer(inputs)[0] - target).square().sum()
    mixer.calibrate(inputs, target)
    after = (mixer(inputs)[0] - target).square().sum()
    assert after < 0.05 * before
    power = mixer.scale.square().mean(1)
    torch.testing.assert_close(power, torch.ones_like(power))


def test_what_no_mamba_has_is_refused():
    for options, match in (
        ({"conv_size": 0}, r"conv_size \(=0\) must be a whole number from 1 to 64"),
        ({"conv_size": 65}, "from 1 to 64"),
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"normalize": "sum"}, "normalize 'sum'"),
        ({"output_gate": 1}, r"output_gate \(=1\) must be true or false"),
    ):
        with pytest.raises(UserError, match=match):
            build_mixer("mamba2", GROUPED, options)
