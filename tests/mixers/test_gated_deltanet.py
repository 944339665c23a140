"""The `gated_deltanet` mixer is transformers' layer of Qwen3.5, and starts near its teacher."""

import dataclasses

import pytest
import torch
from transformers import Qwen3_5TextConfig
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from supra.errors import UserError
from supra.mixers import AttentionShape, Rotary, build_mixer
from supra.testing import mixer_inputs

GROUPED = AttentionShape(6, 2, head_size=8, value_size=8, hidden_size=48, norm_eps=3e-3)
ODD = AttentionShape(3, 3, head_size=10, value_size=7, hidden_size=30, norm_eps=3e-3)
CASES = [(GROUPED, True), (ODD, True), (ODD, False)]


def build(shape=GROUPED, options=None, seed=None):
    """A mixer in float64, with parameters off their start if there is a seed."""
    mixer = build_mixer("gated_deltanet", shape, options or {}).double()
    mixer.reset_parameters()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for x in mixer.parameters():
            x.data.add_(0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype))
        mixer.conv.gain.uniform_(0.5, 2.0, generator=generator)
    return mixer


class Projected(torch.nn.Module):
    """Our mixer behind random projections from hidden states, grouped as in a transformer."""

    def __init__(self, shape, pairs):
        super().__init__()
        self.mixer = build(shape, {"sign_pairs": pairs}, seed=1)
        generator = torch.Generator().manual_seed(2)
        keys, values = shape.key_heads * shape.head_size, shape.key_heads * shape.value_size
        self.weights = {
            name: torch.randn(rows, shape.hidden_size, generator=generator).double() * 0.3
            for name, rows in (
                ("query", shape.query_heads * shape.head_size), ("key", keys), ("value", values)
            )
        }  # fmt: skip

    def forward(self, hidden, state=None, mask=None):
        shape = self.mixer.shape
        heads = {"query": shape.query_heads, "key": shape.key_heads, "value": shape.key_heads}
        projected = {
            name: (hidden @ self.weights[name].T).unflatten(-1, (count, -1))
            for name, count in heads.items()
        }
        inputs = dataclasses.replace(
            mixer_inputs(shape, 1), hidden_states=hidden, padding_mask=mask, **projected
        )
        return self.mixer(inputs, state, return_state=True)


def transformers_layer(ours):
    """Qwen3.5's layer with the weights of ours folded into its own."""
    mixer, shape = ours.mixer, ours.mixer.shape
    blocks, heads = len(mixer.signs), shape.query_heads
    config = Qwen3_5TextConfig(
        hidden_size=shape.hidden_size, num_hidden_layers=1, layer_types=["linear_attention"],
        linear_num_key_heads=heads, linear_num_value_heads=heads, rms_norm_eps=shape.norm_eps,
        linear_key_head_dim=blocks * shape.head_size,
        linear_value_head_dim=blocks * shape.value_size,
    )  # fmt: skip
    theirs = Qwen3_5GatedDeltaNet(config, 0).double().eval()
    constant, rows = mixer.constant.weight[0], []
    for name, bias in (
        ("query", mixer.query_bias), ("key", mixer.key_bias), ("value", mixer.value_bias)
    ):  # fmt: skip
        by_head = ours.weights[name].view(-1, bias.shape[1] // blocks, shape.hidden_size)
        by_head = by_head.repeat_interleave(heads // len(by_head), dim=0)
        pairs = torch.cat([sign * by_head for sign in mixer.signs], dim=1)
        rows.append((pairs + bias[..., None] * constant).flatten(0, 1))
    # the scale and the sum over blocks; after them, the transformer's own projection would come
    scale = (mixer.scale * mixer.magnitude).view(heads, blocks, shape.value_size)
    read = torch.zeros(heads, shape.value_size, heads, blocks, shape.value_size).double()
    for head in range(heads):
        for block in range(blocks):
            read[head, :, head, block] = torch.diag(scale[head, block])
    theirs.out_proj = torch.nn.Linear(1, 1, bias=False).double()
    for parameter, given in (
        (theirs.in_proj_qkv.weight, torch.cat(rows)),
        (theirs.in_proj_z.weight, mixer.output_gate.weight),
        (theirs.in_proj_a.weight, mixer.dt.weight),
        (theirs.in_proj_b.weight, mixer.strength.weight),
        (theirs.conv1d.weight, mixer.conv.taps()[0][:, None]),
        (theirs.dt_bias, mixer.dt.bias),
        (theirs.A_log, mixer.A_log),
        (theirs.norm.weight, torch.ones_like(theirs.norm.weight)),
        (theirs.out_proj.weight, read.view(heads * shape.value_size, -1)),
    ):
        parameter.data = given.detach().clone()
    return theirs, config


@pytest.mark.parametrize(("shape", "pairs"), CASES, ids=["grouped", "odd", "odd without pairs"])
@torch.no_grad()
def test_is_transformers_layer_of_qwen3_5(shape, pairs):
    """Whole rows, left-padded rows, and a prefill that goes on token by token. Their recurrence is
    in float32, whatever the weights are."""
    ours = Projected(shape, pairs)
    theirs, config = transformers_layer(ours)
    hidden = torch.randn(2, 41, shape.hidden_size, generator=torch.Generator().manual_seed(3))
    hidden = hidden.double()

    def close(found, expected):
        torch.testing.assert_close(found.flatten(2), expected, atol=5e-6, rtol=2e-5)

    expected = theirs(hidden)
    assert expected.std() > 0.1
    close(ours(hidden)[0], expected)

    mask = torch.ones(2, 41, dtype=torch.bool)
    mask[0, :7] = False
    padded, found = theirs(hidden, attention_mask=mask), ours(hidden, mask=mask)[0]
    torch.testing.assert_close(found.flatten(2)[mask], padded[mask], atol=5e-6, rtol=2e-5)

    cache, state = DynamicCache(config=config), None
    for piece in hidden.split([29, *[1] * 12], dim=1):
        found, state = ours(piece, state)
        close(found, theirs(piece, cache_params=cache))
    held = cache.get_recurrent_state(0, state_idx=0)
    torch.testing.assert_close(state.memory, held, atol=5e-6, rtol=2e-5, check_dtype=False)


def test_pairs_fit_where_their_heads_have_at_most_256_channels():
    for size, blocks in ((128, 2), (129, 1)):
        shape = dataclasses.replace(GROUPED, head_size=size)
        assert len(build_mixer("gated_deltanet", shape, {}).signs) == blocks


def test_over_a_range_of_one_the_state_turns_the_sign_of_what_it_holds():
    """With β = 2 a token reflects the state along its key."""
    mixer = build(options={"beta_range": 2.0, "conv_size": 1})
    mixer.strength.weight.data.copy_(50 * mixer.constant.weight)
    mixer._set_half_life(torch.full((6,), 1e9))
    inputs = mixer_inputs(GROUPED, 2, seed=4)
    ones = torch.nn.functional.normalize(mixer.constant.weight.detach()[0], dim=0)
    steady = {"hidden_states": ones.expand(2, 2, -1) / mixer.constant.weight.norm()}
    key = inputs.key[:, :1].expand(-1, 2, -1, -1)
    value = torch.cat([inputs.value[:, :1], torch.zeros_like(inputs.value[:, :1])], dim=1)
    inputs = dataclasses.replace(inputs, **steady, key=key, value=value)
    _, first = mixer(inputs.first(1), return_state=True)
    _, second = mixer(inputs, return_state=True)
    torch.testing.assert_close(second.memory, -first.memory, atol=1e-5, rtol=1e-5)


def test_a_rotation_turns_each_block_of_a_pair():
    mixer = build(options={"rotary": True})
    angles = torch.arange(9.0)[None, :, None] * torch.ones(8)
    angles = Rotary(angles.cos(), angles.sin(), apply_rotary_pos_emb, 8)
    inputs = mixer_inputs(GROUPED, 9, seed=6, rotary=angles)
    query, key = (torch.randn(2, 9, 6, 16).double() for _ in range(2))
    found = mixer._rotated(inputs, query, key)
    for block in (slice(0, 8), slice(8, 16)):
        expected = angles(query[..., block], key[..., block])
        assert all(torch.equal(x[..., block], y) for x, y in zip(found, expected, strict=True))


def test_mixing_matrix_is_the_mean_over_the_channels_of_a_head():
    """Of a value that is alike in all channels, their mean is what the matrix makes of it, where
    SiLU is linear: between the blocks of a pair."""
    mixer, inputs = build(seed=7), mixer_inputs(GROUPED, 33, seed=8)
    mixer.value_bias.data.zero_()
    for x in (mixer.conv.weight.data, mixer.conv.gain):
        halves = mixer._parts(x)[2].unflatten(1, (2, 8))
        halves[:, 1] = halves[:, 0]
    inputs = dataclasses.replace(inputs, value=inputs.value[..., :1].expand(-1, -1, -1, 8))
    mixed = torch.einsum(
        "bhij,bjh->bih", mixer.mixing_matrix(inputs), inputs.value[..., 0].repeat_interleave(3, 2)
    )
    positive, negative = mixer.in_blocks(mixer.mix(inputs)[0]).unbind(-2)
    torch.testing.assert_close((positive - negative).mean(-1), mixed, atol=1e-12, rtol=1e-12)


def test_calibration_finds_what_made_the_target():
    """Half-lives, strengths and sharpness per head, taps of values, and a scale. The second pass of
    a choice may find another one."""
    maker, mixer, inputs = build(), build(), mixer_inputs(GROUPED, 200, seed=1)
    inputs = dataclasses.replace(inputs, hidden_states=inputs.hidden_states + 4)
    maker.calibrate(inputs, maker(inputs)[0])
    maker._set_half_life(torch.tensor([4.0, 16, 64, 256, 16, 64]))
    maker._set_strength(torch.tensor([0.03, 0.06, 0.12, 0.25, 0.5, 0.5]))
    query, _, value = maker._parts(maker.conv.weight.data)
    query *= torch.tensor([0.25, 0.5, 1, 2, 1, 1])[:, None, None]
    taps = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(2)).repeat(1, 2, 1)
    value.copy_(taps / taps.norm(dim=-1, keepdim=True))
    target = 3 * maker(inputs)[0].detach()
    before = (mixer(inputs)[0] - target).square().sum()
    mixer.calibrate(inputs, target)
    after = (mixer(inputs)[0] - target).square().sum()
    assert after < 0.05 * before
    assert after < 0.1 * target.square().sum()


@torch.no_grad()
def test_first_rows_are_computed_as_in_the_whole_batch():
    mixer, inputs = build(options={"rotary": True}, seed=5), mixer_inputs(GROUPED, 12, seed=6)
    angles = torch.arange(12.0).expand(2, 12)[..., None] * torch.ones(8)
    angles = Rotary(angles.cos(), angles.sin(), apply_rotary_pos_emb, 8)
    bounds = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32)
    mask = torch.ones(2, 12, dtype=torch.bool)
    for case in ({}, {"cu_seqlens": bounds}, {"padding_mask": mask}):
        given = dataclasses.replace(inputs, rotary=angles, **case)
        torch.testing.assert_close(mixer(given.first_rows(1))[0], mixer(given)[0][:1])


def test_what_no_layer_of_qwen3_5_has_is_refused():
    for options, match in (
        ({"conv_size": 0}, r"conv_size \(=0\) must be a whole number from 1 to 64"),
        ({"beta_range": 0.5}, r"beta_range \(=0.5\)"),
        ({"beta_range": 2.5}, r"beta_range \(=2.5\)"),
        ({"sign_pairs": 1}, r"sign_pairs \(=1\) must be true or false"),
    ):
        with pytest.raises(UserError, match=match):
            build_mixer("gated_deltanet", GROUPED, options)
