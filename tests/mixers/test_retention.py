"""The `retention` mixer is RetNet's equation 8, from the teacher's query, key and value."""

import pytest
import torch

from supra.errors import UserError
from supra.mixers import AttentionShape, build_mixer
from supra.mixers.retention import retention_log_decay
from supra.testing import mixer_inputs

SHAPE = AttentionShape(query_heads=6, key_heads=2, head_size=8, value_size=7, hidden_size=24)


def make(**options):
    mixer = build_mixer("retention", SHAPE, options).double()
    mixer.reset_parameters()
    return mixer


def retention(inputs):
    """Σ_{j≤i} γ^{i−j} c (qᵢ·kⱼ) vⱼ by all T² weights, in float64."""
    key, value = (x.repeat_interleave(3, dim=2) for x in (inputs.key, inputs.value))
    tokens = torch.arange(inputs.query.shape[1])
    decay = 1 - 2.0 ** (-5 - torch.arange(6, dtype=torch.float64))
    weights = (decay[:, None, None] ** (tokens[:, None] - tokens)).tril()
    scores = torch.einsum("bihk,bjhk->bhij", inputs.query, key) * inputs.scaling
    return torch.einsum("bhij,bjhv->bihv", scores * weights, value), scores * weights


def group_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rms_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("norm", [group_norm, rms_norm])
def test_is_the_papers_equation(norm):
    mixer, inputs = make(normalize=norm.__name__.split("_")[0]), mixer_inputs(SHAPE, 90)
    gate = mixer.output_gate
    gate.weight.data.normal_()
    mixer.scale.data.normal_()
    logits = inputs.hidden_states @ gate.weight.T + gate.bias
    swish = (logits * logits.sigmoid()).unflatten(-1, (6, 7))
    expected = norm(retention(inputs)[0]) * mixer.scale * mixer.magnitude * swish
    torch.testing.assert_close(mixer(inputs)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_norm_cancels_the_papers_scalings_of_weights():
    """Section 2.2: each row of weights is divided by √d, by √Σ D, then by max(|Σ R|, 1)."""
    inputs = mixer_inputs(SHAPE, 90)
    sums, weights = retention(inputs)
    tokens = torch.arange(90)
    decay = 1 - 2.0 ** (-5 - torch.arange(6, dtype=torch.float64))
    rows = (decay[:, None, None] ** (tokens[:, None] - tokens)).tril().sum(-1).sqrt()
    scaled = weights / rows[..., None]
    scaled = scaled / scaled.sum(-1, keepdim=True).abs().clamp(min=1)
    value = inputs.value.repeat_interleave(3, dim=2)
    published = torch.einsum("bhij,bjhv->bihv", scaled, value)
    size = published.square().mean((0, 1, 3), keepdim=True).sqrt()  # large against the norm's 1e-5
    found, expected = (group_norm(1e3 * x / size) for x in (sums, published))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_the_mixing_matrix_is_the_weights():
    inputs = mixer_inputs(SHAPE, 20)
    torch.testing.assert_close(
        make().mixing_matrix(inputs), retention(inputs)[1], atol=1e-6, rtol=1e-6
    )


def test_decays_are_the_published_ones_and_stay_apart():
    log_decay = retention_log_decay(40)
    assert log_decay[:3].exp().tolist() == pytest.approx([31 / 32, 63 / 64, 127 / 128])
    assert (log_decay.diff() > 0).all() and (log_decay < 0).all()


def test_it_learns_nothing_but_gate_and_scale():
    names = {name for name, _ in make().named_parameters()}
    assert names == {"scale", "output_gate.weight", "output_gate.bias"}
    assert not [*make(scale=False, output_gate=False).parameters()]


def test_calibration_brings_it_closer():
    mixer, inputs = make(), mixer_inputs(SHAPE, 90)
    target = build_mixer("softmax", SHAPE, {})(inputs)[0]
    before = (mixer(inputs)[0] - target).square().mean()
    mixer.calibrate(inputs, target)
    assert (mixer(inputs)[0] - target).square().mean() < 0.5 * before


@pytest.mark.parametrize(
    ("options", "message"), [({"normalize": "none"}, "group, rms"), ({"scale": 1}, "true or false")]
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)
