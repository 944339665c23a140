"""Parts of rows on several ranks, against whole rows on one, in float64."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from supra.mixers import AttentionShape, Rotary, build_mixer
from supra.mixers.ranks import Ranks, state_before
from supra.mixers.row_parts import RowPart
from supra.model.rows import document_boundaries
from supra.testing import mixer_inputs
from tests.mixers.test_contract import rotate_half
from tests.ranks import on_ranks

SHAPE = AttentionShape(query_heads=4, key_heads=2, head_size=6, value_size=5, hidden_size=12)
LENGTHS = (10, 17, 4)  # tokens on each rank
TOKENS = sum(LENGTHS)
MIXERS = [
    ("supra", {}),
    ("supra", {"decay": "none", "normalize": "sum", "feature_map": "relu"}),
    ("supra", {"decay": "gated"}),
    ("window", {"size": 5, "sinks": 3}),
    ("window", {"size": 12, "sinks": 0, "rotary": False}),
    ("gated_delta", {}),
    ("gated_deltanet", {"sign_pairs": False}),
    ("kda", {"sign_pairs": False}),
    ("mamba2", {}),
    ("mamba2", {"form": "granite"}),
    ("rwkv", {"rank": 3, "token_shift": True}),
    ("rwkv", {"form": "qrwkv", "rank": 3}),
    ("h3", {"init": "published", "d_state": 6, "head_size": 1}),
    ("h3", {"gates": False, "d_state": 4}),
    ("retention", {}),
    ("softmax", {}),
]
KEPT = torch.ones(2, TOKENS, dtype=torch.bool)
KEPT[0, :12] = KEPT[1, 8:13] = KEPT[1, 28:] = False
# for each row, the lengths of its documents
PACKED = {
    "within and over ranks": ((5, 20, 6), (10, 21)),
    "over all ranks": ((3, 28), (31,)),
}
NAMES = ("hidden_states", "query", "key", "value")


def rotary(positions):
    angles = positions[..., None] * torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    angles = torch.cat([angles, angles], dim=-1)
    return Rotary(angles.cos(), angles.sin(), rotate_half, 6)


def trained(name, options):
    mixer = build_mixer(name, SHAPE, options).double()
    mixer.reset_parameters()
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += 0.1 * noise
    return mixer


def rows(packed=None, kept=None, window=None):
    """Whole rows, the positions of their tokens, and the numbers of their documents."""
    positions = torch.arange(TOKENS).expand(2, -1)
    if packed:
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in packed])
    bounds = document_boundaries(positions, 2)
    inputs = mixer_inputs(
        SHAPE,
        TOKENS,
        padding_mask=kept,
        rotary=rotary(positions),
        cu_seqlens=None if bounds is None else bounds[0, 0, 0],
        sliding_window=window,
    )
    return inputs, positions, (positions == 0).cumsum(1) - 1


def part_of(inputs, positions, documents, ranks):
    valid = inputs.padding_mask
    known = torch.ones_like(documents, dtype=torch.bool) if valid is None else valid
    part = RowPart(ranks, LENGTHS, known, documents)
    here = slice(part.start, part.stop)
    bounds = document_boundaries(positions[:, here], 2)
    return dataclasses.replace(
        inputs,
        **{name: getattr(inputs, name)[:, here].detach().requires_grad_() for name in NAMES},
        rotary=rotary(positions[:, here]),
        padding_mask=None if valid is None else valid[:, here],
        cu_seqlens=None if bounds is None else bounds[0, 0, 0],
        part=part,
    )


def gradients(mixer, inputs, output, weight):
    if inputs.padding_mask is not None:
        output = output[inputs.padding_mask]
        weight = weight[inputs.padding_mask]
    leaves = [getattr(inputs, name) for name in NAMES] + list(mixer.parameters())
    found = torch.autograd.grad((output * weight).sum(), leaves, allow_unused=True)
    found = [torch.zeros_like(x) if y is None else y for x, y in zip(leaves, found, strict=True)]
    return found[: len(NAMES)], found[len(NAMES) :]


def check(actual, expected, what):
    assert actual.shape == expected.shape, what
    if actual.numel():
        error = (actual - expected).abs().max().item()
        assert error < 1e-6 * max(1.0, expected.abs().max().item()), (what, error)


def check_mixer(name, options, **kind):
    what = name, options, kind
    mixer, ranks = trained(name, options), Ranks()
    inputs, positions, documents = rows(**kind)
    whole = dataclasses.replace(
        inputs, **{name: getattr(inputs, name).requires_grad_() for name in NAMES}
    )
    stateful = inputs.cu_seqlens is None
    expected, end = mixer(whole, return_state=stateful)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    of_inputs, of_parameters = gradients(mixer, whole, expected, weight)

    own = part_of(inputs, positions, documents, ranks)
    here = slice(own.part.start, own.part.stop)
    output, state = mixer(own, return_state=stateful)
    kept = slice(None) if own.padding_mask is None else own.padding_mask
    check(output[kept], expected[:, here][kept], (*what, "output"))
    ours, sums = gradients(mixer, own, output, weight[:, here])
    for field, x, y in zip(NAMES, ours, of_inputs, strict=True):
        check(x, y[:, here], (*what, field))
    for (field, _), x, y in zip(mixer.named_parameters(), sums, of_parameters, strict=True):
        dist.all_reduce(x)
        check(x, y, (*what, field))
    if stateful and ranks.rank == ranks.size - 1:
        for field, x, y in zip(end._fields, state, end, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                check(x.double(), y.double(), (*what, field))


def check_mixers(mixers, kinds):
    for name, options in mixers:
        for kind in kinds:
            check_mixer(name, options, **kind)


def test_parts_of_rows_are_whole_rows(tmp_path):
    """Outputs, gradients, and the state behind the last token: of whole, padded and packed rows."""
    kinds = [{}, {"kept": KEPT}, *({"packed": x} for x in PACKED.values())]
    windows = [{"window": 7}, {"window": 7, "kept": KEPT}]
    on_ranks(check_all, len(LENGTHS), tmp_path, kinds, windows)


def check_all(kinds, windows):
    check_mixers(MIXERS, kinds)
    check_mixers([("softmax", {})], windows)


def check_state_before():
    """Against the loop over ranks, with autograd through it."""
    ranks, generator = Ranks(), torch.Generator().manual_seed(0)

    def random(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    for factor in ((4, 4), (4, 1), (1, 1)):
        a, b = random(ranks.size, 2, 3, *factor), random(ranks.size, 2, 3, 4, 5)
        weights = random(ranks.size, 2, 3, 4, 5)
        a, b = a.requires_grad_(), b.requires_grad_()
        state, loss = torch.zeros_like(b[0]), 0
        for rank in range(ranks.size):
            loss = loss + (state * weights[rank]).sum()
            if rank == ranks.rank:
                expected = state
            state = (a[rank] @ state if factor == (4, 4) else a[rank] * state) + b[rank]
        expected_gradients = torch.autograd.grad(loss, (a, b))
        own = [x[ranks.rank].detach().requires_grad_() for x in (a, b)]
        found = state_before(*own, ranks)
        torch.testing.assert_close(found, expected)
        ours = torch.autograd.grad((found * weights[ranks.rank]).sum(), own)
        for x, y in zip(ours, expected_gradients, strict=True):
            torch.testing.assert_close(x, y[ranks.rank])


@pytest.mark.parametrize("ranks", [2, 4])
def test_state_before_is_the_loop_over_ranks(tmp_path, ranks):
    on_ranks(check_state_before, ranks, tmp_path)
