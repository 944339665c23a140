"""The `supra` mixer is equation 10 of the paper, and its start is what it says it is."""

import pytest
import torch

from supra.errors import UserError
from supra.mixers import MIXERS, PRESETS, AttentionShape, Rotary, build_mixer
from supra.mixers.supra import lightning_slopes
from supra.testing import mixer_inputs


def quadratic(query, key, value, slopes):
    """GroupNorm(Σ_{j≤i} γ^{i−j} (qᵢ·kⱼ) vⱼ) with all heads alike, written as it stands."""
    tokens = torch.arange(query.shape[1])
    distance = tokens[:, None] - tokens[None, :]
    weights = torch.exp(-slopes.double()[:, None, None] * distance).tril()
    scores = torch.einsum("bihk,bjhk->bhij", query, key) * weights / query.shape[-1] ** 0.5
    mixed = torch.einsum("bhij,bjhv->bihv", scores, value)
    mean = mixed.mean(-1, keepdim=True)
    return (mixed - mean) / (mixed.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def inputs_of(shape, rotary=None):
    return mixer_inputs(shape, 45, seed=2, rotary=rotary)


def test_is_the_papers_equation():
    shape = AttentionShape(5, 5, 8, 6, 40)
    mixer = build_mixer("supra_paper", shape, {}).double()
    mixer.reset_parameters()
    inputs = inputs_of(shape)
    flat = (x.flatten(2) for x in (inputs.query, inputs.key))
    weight, bias = mixer.feature_map.query_weight, mixer.feature_map.query_bias
    features = [(x @ weight.T + bias).relu().view(2, 45, 5, 8) for x in flat]
    expected = quadratic(*features, inputs.value, lightning_slopes(5))
    torch.testing.assert_close(mixer(inputs)[0], expected, atol=1e-6, rtol=1e-6)


def test_paper_form_has_fixed_decay_no_scale_and_one_matrix():
    mixer = build_mixer("supra_paper", AttentionShape(5, 5, 8, 8, 40), {})
    trained = {name: p.shape for name, p in mixer.named_parameters()}
    assert trained == {"feature_map.query_weight": (40, 40), "feature_map.query_bias": (40,)}


def test_grouped_heads_give_the_keys_a_matrix_of_their_own():
    mixer = build_mixer("supra_paper", AttentionShape(6, 2, 8, 8, 48), {})
    assert mixer.feature_map.key_weight.shape == (16, 16)


def test_sign_pair_starts_as_the_products_that_agree_in_sign():
    shape = AttentionShape(4, 2, 8, 8, 32)
    mixer = build_mixer("supra", shape, {})
    mixer.reset_parameters()
    x, y = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 2, 8)
    query, key = mixer.feature_map(x, y)
    key = key.repeat_interleave(2, dim=2)
    products = x * y.repeat_interleave(2, dim=2)
    torch.testing.assert_close((query * key).sum(-1), products.relu().sum(-1))


def test_rotary_turns_both_halves_of_the_pair():
    """RoPE after φ is relative: shifting all positions changes nothing."""
    shape = AttentionShape(4, 2, 8, 8, 32)
    mixer = build_mixer("supra", shape, {}).double()
    mixer.reset_parameters()

    def turn(query, key, cos, sin, unsqueeze_dim):
        def turned(x):
            first, second = x.chunk(2, dim=-1)
            rotated = torch.cat([-second, first], dim=-1)
            return x * cos.unsqueeze(unsqueeze_dim) + rotated * sin.unsqueeze(unsqueeze_dim)

        return turned(query), turned(key)

    def at(shift):
        positions = torch.arange(shift, shift + 45, dtype=torch.float64)
        angles = positions[None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.03] * 2).double()
        return mixer(inputs_of(shape, Rotary(angles.cos(), angles.sin(), turn, angles.shape[-1])))[
            0
        ]

    torch.testing.assert_close(at(0), at(1000), atol=1e-6, rtol=1e-6)

    # turned once, not twice: relu pairs of rotated features in the equation as it stands
    inputs = inputs_of(shape)
    features = mixer.feature_map(inputs.query, inputs.key)
    positions = torch.arange(45, dtype=torch.float64)
    angles = positions[None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.03] * 2).double()
    halves = [x.unflatten(-1, (2, 8)).flatten(2, 3) for x in features]
    turned = turn(*halves, angles.cos(), angles.sin(), 2)
    query, key = (x.unflatten(2, (-1, 2)).flatten(3) for x in turned)
    repeated = [x.repeat_interleave(2, dim=2) for x in (key, inputs.value)]
    expected = quadratic(query * 2**0.5, *repeated, lightning_slopes(4))  # its own 1/√16
    torch.testing.assert_close(at(0), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 8, 9, 15, 32])
def test_slopes_for_any_number_of_heads(heads):
    slopes = lightning_slopes(heads)
    assert slopes.shape == (heads,)
    torch.testing.assert_close(slopes[-1], torch.tensor(2.0**-8))  # half-life 177 tokens
    assert (slopes.diff() < 0).all()


def weighted_mean(weights, value):
    """Σ_{j≤i} w_ij v_j / Σ_{j≤i} w_ij of weights [B, H, T, T]."""
    weights = weights.tril()
    mean = torch.einsum("bhij,bjhv->bihv", weights, value)
    return mean / weights.sum(-1).transpose(1, 2)[..., None]


@pytest.mark.parametrize("name", ["t2r", "hedgehog"])
def test_normalised_presets_are_weighted_means(name):
    shape = AttentionShape(4, 2, 8, 6, 32)
    mixer = build_mixer(name, shape, {}).double()
    mixer.reset_parameters()
    inputs = inputs_of(shape)
    x = (inputs.query, inputs.key)
    if name == "t2r":
        query, key = (y.relu() for y in x)
    else:
        query, key = (torch.cat([y, -y], -1).softmax(-1) for y in x)
    key, value = (y.repeat_interleave(2, dim=2) for y in (key, inputs.value))
    expected = weighted_mean(torch.einsum("bihk,bjhk->bhij", query, key), value)
    torch.testing.assert_close(mixer(inputs)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("heads", "keys"), [(5, 5), (4, 2)])
def test_t2r_is_the_papers_equation(heads, keys):
    """Kasai et al. 2021, equations 2 and 5: one W of k rows, fewer than the channels, for queries
    and keys of a head."""
    shape = AttentionShape(heads, keys, 8, 6, 32)
    mixer = build_mixer("t2r_paper", shape, {"feature_size": 3}).double()
    mixer.reset_parameters()
    weight, bias = mixer.feature_map.weight, mixer.feature_map.bias.data.normal_()
    assert [tuple(x.shape) for x in mixer.parameters()] == [(keys, 3, 8), (keys, 3)]
    rows = torch.eye(3).double().expand(keys, 3, 3)
    torch.testing.assert_close(weight @ weight.mT, rows, atol=1e-6, rtol=0)
    inputs = inputs_of(shape)
    value = inputs.value.repeat_interleave(heads // keys, dim=2)
    weights = torch.zeros(2, heads, 45, 45, dtype=torch.float64)
    for head in range(heads):
        own = head * keys // heads
        query, key = (
            (x[:, :, n] @ weight[own].T + bias[own]).relu()
            for x, n in ((inputs.query, head), (inputs.key, own))
        )
        weights[:, head] = query @ key.mT
    # 1e-6 is added to the sum of the weights, which counts where features are dead
    expected = weighted_mean(weights + 1e-300, value)
    alive = weights.tril().sum(-1).transpose(1, 2) > 1e-2
    torch.testing.assert_close(mixer(inputs)[0][alive], expected[alive], atol=1e-3, rtol=1e-3)
    state = mixer(inputs, return_state=True)[1]
    assert state.memory.shape == (2, keys, 3, 6), "the economy: a state of k rows"


def test_the_published_width_is_32_where_heads_are_wider():
    for size, features in ((64, 32), (8, 8)):
        mixer = build_mixer("t2r_paper", AttentionShape(2, 2, size, size, 128), {})
        assert mixer.feature_map.weight.shape == (2, features, size)


def test_qk_norm_is_that_of_the_published_code():
    """LayerNorm over all heads at once, between φ and the sums, with a gain: equation 10 with
    normalised features."""
    shape = AttentionShape(5, 5, 8, 6, 40)
    mixer = build_mixer("supra_paper", shape, {"qk_norm": True}).double()
    mixer.reset_parameters()
    assert torch.equal(mixer.feature_map.query_gain, torch.ones(5, 8).double())
    gains = [x.data.normal_() for x in (mixer.feature_map.query_gain, mixer.feature_map.key_gain)]
    inputs = inputs_of(shape)
    maps, features = mixer.feature_map.features, []
    for x, gain in zip((inputs.query, inputs.key), gains, strict=True):
        flat = (x.flatten(2) @ maps.query_weight.T + maps.query_bias).relu()
        centred = flat - flat.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        features.append(normed.view(2, 45, 5, 8) * gain)
    expected = quadratic(*features, inputs.value, lightning_slopes(5))
    torch.testing.assert_close(mixer(inputs)[0], expected, atol=1e-5, rtol=1e-5)


def test_qk_norm_comes_before_the_rotation():
    """A norm of all heads together sees rotated and unrotated features alike, a gain does not."""
    shape = AttentionShape(4, 2, 8, 8, 32)
    mixer = build_mixer("supra", shape, {"qk_norm": True})
    assert mixer.feature_map.query_gain.shape == (4, 16), "both halves of the sign pair"
    assert not mixer.feature_map.after_rotary


def test_gated_starts_with_half_lives_that_the_gate_can_change():
    shape = AttentionShape(3, 3, 8, 8, 24)
    mixer = build_mixer("gated", shape, {}).double()
    mixer.reset_parameters()
    inputs = inputs_of(shape)
    decay = mixer.decay_gate(inputs.hidden_states).exp()
    half_lives = torch.log(torch.tensor(0.5)) / decay.log()
    expected = torch.tensor([4.0, 4 * 512**0.5, 2048.0], dtype=torch.float64)
    torch.testing.assert_close(half_lives[0, 0], expected, atol=0, rtol=1e-4)
    mixer.decay_gate.weight.data.normal_()
    assert mixer.decay_gate(inputs.hidden_states).std(dim=1).min() > 0.1


def test_mixing_matrix_is_what_multiplies_the_values():
    shape = AttentionShape(4, 2, 8, 6, 32)
    for name in ("supra", "gated", "gated_delta", "softmax", "window"):
        mixer = build_mixer(name, shape, {}).double()
        mixer.reset_parameters()
        inputs = inputs_of(shape)
        value = inputs.value.repeat_interleave(2, dim=2)
        mixed = torch.einsum("bhij,bjhv->bihv", mixer.mixing_matrix(inputs), value)
        torch.testing.assert_close(mixer.mix(inputs)[0], mixed, atol=1e-6, rtol=1e-6)


def test_mixers_that_average_have_weights_that_sum_to_one():
    """A stage learns their rows as distributions. Only a query without a live feature has none."""
    shape, averaging = AttentionShape(4, 2, 8, 6, 32), []
    for name in (*MIXERS, *PRESETS):
        mixer = build_mixer(name, shape, {}).double()
        mixer.reset_parameters()
        if mixer.averages:
            averaging.append(name)
            matrix = mixer.mixing_matrix(inputs_of(shape))
            assert matrix.min() >= 0, name
            torch.testing.assert_close(matrix.sum(-1).median().item(), 1.0, atol=1e-4, rtol=0)
    expected = {"softmax", "window", "t2r", "t2r_paper", "hedgehog", "lolcats", "gated"}
    assert set(averaging) == expected


def test_weights_that_may_be_negative_cannot_be_normalised_by_their_sum():
    with pytest.raises(UserError, match="stay nonnegative"):
        build_mixer("supra", AttentionShape(2, 2, 8, 8, 16), {"normalize": "sum"})


WIDE = AttentionShape(query_heads=4, key_heads=2, head_size=8, value_size=8, hidden_size=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expansion": 0}, r"expansion \(=0\) must be a whole number from 1 to 256"),
        ({"expansion": 257}, r"expansion \(=257\) must be a whole number from 1 to 256"),
        ({"expansion": 2, "feature_map": "identity"}, "needs a feature map with weights"),
        ({"expansion": 2, "feature_map": "shared_relu"}, "needs a feature map with weights"),
        ({"feature_size": 0, "feature_map": "shared_relu"}, r"feature_size \(=0\)"),
        (
            {"qk_norm": True, "feature_map": "hedgehog"},
            r"qk_norm \(=True\) makes features",
        ),
    ],
)
def test_mistakes_in_options_of_features(options, message):
    with pytest.raises(UserError, match=message):
        build_mixer("supra", WIDE, options)


def test_wider_features_start_as_rotations_of_the_head():
    mixer = build_mixer("gated", WIDE, {"expansion": 3})
    mixer.reset_parameters()
    weight = mixer.feature_map.key_weight.unflatten(1, (3, -1))
    identity = torch.eye(WIDE.head_size).expand_as(weight)
    assert torch.equal(weight[:, 0], identity[:, 0])
    torch.testing.assert_close(weight @ weight.mT, identity, atol=1e-5, rtol=0)
    assert not torch.allclose(weight[:, 1], weight[:, 2])
    query, key = (torch.randn(2, 5, n, WIDE.head_size) for n in (4, 2))
    assert all(x.shape[-1] == 6 * WIDE.head_size for x in mixer.feature_map(query, key))
