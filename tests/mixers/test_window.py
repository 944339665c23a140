"""The `window` mixer is softmax within its window, and one softmax with what has left it."""

import dataclasses

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from supra.errors import UserError
from supra.mixers import AttentionShape, Rotary, build_mixer
from supra.mixers.band import band_distance, band_scores, band_sums
from supra.testing import mixer_inputs

SHAPE = AttentionShape(query_heads=6, key_heads=2, head_size=8, value_size=7, hidden_size=48)
TOKENS = 70


def window(**options):
    mixer = build_mixer("window", SHAPE, options).double()
    mixer.reset_parameters()
    return mixer


def softmax(inputs):
    return build_mixer("softmax", SHAPE, {})(inputs)[0]


def inputs(**fields):
    return mixer_inputs(SHAPE, TOKENS, seed=3, **fields)


@pytest.mark.parametrize("options", [{"size": 70, "sinks": 0}, {"size": 66, "sinks": 4}])
def test_nothing_left_is_softmax_attention(options):
    """With 4 sinks that stay, a window of 66 reaches back to the first token of 70."""
    mixer = window(output_gate=False, **options)
    torch.testing.assert_close(mixer(inputs())[0], softmax(inputs()))
    assert (window(size=65, sinks=4)(inputs())[0] - softmax(inputs()))[:, -1].abs().max() > 1e-3


def test_without_rotary_the_window_is_rotated_and_the_linear_part_is_not():
    angles = torch.arange(TOKENS).double()[None, :, None].expand(-1, -1, 8) / 3
    turned = Rotary(angles.cos(), angles.sin(), apply_rotary_pos_emb, 8)
    whole = window(size=70, rotary=False)
    torch.testing.assert_close(whole(inputs(rotary=turned))[0], softmax(inputs(rotary=turned)))
    mixer, rotated = window(size=5, rotary=False), window(size=5)
    rotated.load_state_dict(mixer.state_dict())
    with_rotary, without = (
        [x(inputs(rotary=y))[0] for x in (mixer, rotated)] for y in (turned, None)
    )
    assert (with_rotary[0] - with_rotary[1]).abs().max() > 1e-3
    torch.testing.assert_close(*without)
    mixer, rotated = (window(size=5, sinks=0, rotary=x) for x in (False, True))
    rotated.load_state_dict(mixer.state_dict())
    for part in (mixer, rotated):
        part.only = "linear"
    # what remains of the window is the current token, whose score no rotation changes
    alone = [x(inputs(rotary=y))[0] for x, y in ((mixer, turned), (rotated, None))]
    torch.testing.assert_close(*alone)


@pytest.mark.parametrize("field", [{"softcap": 1.5}, {"sinks": torch.linspace(-1, 2, 6)}])
def test_the_teachers_softcap_and_sinks_are_kept(field):
    if "sinks" in field:
        field = {"sinks": field["sinks"].double()}
    mixer = window(size=70)
    torch.testing.assert_close(mixer(inputs(**field))[0], softmax(inputs(**field)))


@pytest.mark.parametrize("decay", ["none", "gated"])
def test_is_its_equation(decay):
    """Written as it stands, token by token, in float64."""
    size, sinks = 5, 3
    mixer = window(size=size, sinks=sinks, decay=decay, output_gate=False)
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    given = inputs()
    output, _ = mixer(given)
    features = mixer.feature_map(given.query, given.key)
    weight = mixer.linear_weight(given.hidden_states)
    log_decay = mixer.decay_gate(given.hidden_states) if decay == "gated" else 0 * weight
    total = log_decay.cumsum(1)
    for token in (0, 2, 6, 8, 41, 69):
        for head in range(6):
            exact, left = [], []
            for j in range(token + 1):
                score = given.query[:, token, head] * given.key[:, j, head // 3]
                if token - j < size or j < sinks:
                    exact.append((j, score.sum(-1) * given.scaling))
                else:
                    overlap = (features[0][:, token, head] * features[1][:, j, head // 3]).sum(-1)
                    # it entered the state when it left the window, and has decayed since
                    decayed = total[:, token, head] - total[:, j + size, head]
                    left.append((j, weight[:, token, head] + overlap.log() + decayed))
            shares = torch.stack([x for _, x in exact + left], -1).softmax(-1)
            values = torch.stack([given.value[:, j, head // 3] for j, _ in exact + left], 1)
            expected = (shares[..., None] * values).sum(1)
            torch.testing.assert_close(output[:, token, head], expected, atol=1e-6, rtol=1e-6)


def test_each_branch_can_be_left_alone():
    mixer = window(size=5, sinks=0, output_gate=False)
    mixer.only = "window"
    banded = dataclasses.replace(inputs(), sliding_window=5)
    torch.testing.assert_close(mixer(inputs())[0], softmax(banded))
    mixer.only = "linear"
    alone = window(size=1, sinks=0, output_gate=False)
    alone.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(inputs())[0], alone(inputs())[0])


def test_dropout_narrows_the_window_in_training_only():
    mixer = window(size=9, dropout=0.5)
    torch.manual_seed(0)
    mixer.train()
    seen = {round(mixer(inputs())[0].sum().item(), 6) for _ in range(20)}
    mixer.eval()
    assert len(seen) == 2
    assert len({mixer(inputs())[0].sum().item() for _ in range(5)}) == 1


@pytest.mark.parametrize("options", [{}, {"sinks": 2}, {"feature_map": "hedgehog"}], ids=str)
def test_a_short_row_reads_no_further_than_it_is_long(options, monkeypatch):
    """It gives what the whole window would, after an empty state."""
    mixer, row, sizes = window(size=90, **options), inputs(), []
    expected, state = mixer.mix(row, mixer._empty_state(row), return_state=True)
    plain = band_scores
    monkeypatch.setattr(
        "supra.mixers.window.band_scores", lambda *args: sizes.append(args[2]) or plain(*args)
    )
    found, own = mixer.mix(row, return_state=True)
    assert sizes == [row.query.shape[1]]
    for a, b in zip((found, *own), (expected, *state), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_state_has_a_constant_size():
    mixer = window(size=9, sinks=2)
    sizes = []
    state = None
    for tokens in (1, 3, 70):
        _, state = mixer(mixer_inputs(SHAPE, tokens, seed=tokens), state, return_state=True)
        sizes.append([x.shape for x in state])
    assert sizes[0] == sizes[1] == sizes[2]
    assert state.length.tolist() == [74, 74]


@pytest.mark.parametrize(
    ("tokens", "size", "block"), [(1, 5, 1), (64, 5, 64), (70, 64, 64), (130, 3, 64)]
)
def test_bands(tokens, size, block):
    torch.manual_seed(0)
    query, key = torch.randn(2, tokens, 4, 3), torch.randn(2, size + tokens, 2, 3)
    distance = band_distance(tokens, size, query.device)
    scores = band_scores(query, key, size)
    assert scores.shape == (2, tokens, 4, block + size - 1)
    inside = (distance >= 0) & (distance < size)
    assert inside.sum(1).eq(size).all()
    shares = torch.rand_like(scores) * inside[:, None]
    sums = band_sums(shares, key, size)
    for token in range(tokens):
        at = token + size - distance[token][inside[token]]
        expected = torch.einsum("bhk,bjhk->bhj", query[:, token, ::2], key[:, at])
        torch.testing.assert_close(scores[:, token, ::2][..., inside[token]], expected)
        weights = shares[:, token, ::2][..., inside[token]]
        expected = torch.einsum("bhj,bjhk->bhk", weights, key[:, at])
        torch.testing.assert_close(sums[:, token, ::2], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"size \(=0\) must be a whole number from 1 to 32768"),
        ({"size": 32769}, r"size \(=32769\) must be a whole number from 1 to 32768"),
        ({"sinks": -1}, r"sinks \(=-1\) must be a whole number from 0 to 32768"),
        ({"sinks": 32769}, r"sinks \(=32769\) must be a whole number from 0 to 32768"),
        ({"dropout": 1}, r"dropout \(=1\) must be a finite number >= 0 and < 1"),
        ({"feature_map": "identity"}, "hedgehog, relu"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        window(**options)
