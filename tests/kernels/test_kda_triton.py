"""Kimi Delta Attention's Triton kernels in the interpreter, against the float64 recurrence."""

from functools import partial

import pytest
import torch

from supra.kernels import launch
from supra.kernels.kda import chunk_kda, recurrent_kda
from supra.kernels.kda.api import OPERATOR
from tests.kernels import test_gated_delta_rule_triton as delta
from tests.kernels.test_gated_delta_rule_triton import _poison, make_state  # noqa: F401

# largest relative errors seen over everything below: 2e-6, 1.3e-5, 5e-3
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
results = partial(delta.results, function=chunk_kda)
assert_matches = partial(delta.assert_matches, function=chunk_kda)


def make_inputs(length, dtype=torch.float32, **options):
    """query, key of length 1, value, beta in [0, 2), log_decay in (-4, 0], most of it weak."""
    inputs = delta.make_inputs(length, None, dtype, **options)
    generator = torch.Generator().manual_seed(length)
    decay = torch.rand(inputs["key"].shape, generator=generator)
    return inputs | {"log_decay": (-4 * decay**4).requires_grad_()}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_forms(dtype):
    inputs = make_inputs(70, dtype, heads=2, widths=(17, 20))
    assert_matches(inputs, make_state(inputs, 1), TOLERANCES[dtype], scale=0.7)


@pytest.mark.parametrize(("length", "batch"), [(3, 2), (130, 1)])
def test_lengths(length, batch):
    inputs = make_inputs(length, batch=batch, heads=2, kv_heads=2, seed=length)
    assert_matches(inputs, None, TOLERANCES[torch.float32], scale=0.7)


@pytest.mark.parametrize("widths", [(8, 100), (200, 16)])
def test_widths(widths):
    inputs = make_inputs(20, widths=widths)
    with launch.target("small"):
        assert_matches(inputs, make_state(inputs, 1), TOLERANCES[torch.float32])


def test_packed_sequences_resets_and_strong_decay():
    bounds = torch.tensor([0, 0, 1, 20, 20, 85, 85], dtype=torch.int32)
    inputs = make_inputs(85, widths=(16, 20))
    with torch.no_grad():
        inputs["log_decay"][:, [0, 9, 10, 11, 24, 70]] = -1e4
        inputs["log_decay"][:, ::7, :, ::2] = -torch.inf
        inputs["log_decay"][:, 30:60] *= 20
    state = make_state(inputs, len(bounds) - 1)
    assert_matches(inputs, state, TOLERANCES[torch.float32], cu_seqlens=bounds)


def test_strong_decay_of_all_tokens():
    inputs = make_inputs(66)
    with torch.no_grad():
        inputs["log_decay"][:] = -104
    assert_matches(inputs, make_state(inputs, 1), TOLERANCES[torch.float32])


@pytest.mark.parametrize("beta", [1.0, 1.99])
def test_keys_that_are_all_alike(beta):
    inputs = make_inputs(64)
    with torch.no_grad():
        inputs["key"][:] = inputs["key"][:, :1]
        inputs["beta"][:] = beta
        inputs["log_decay"] *= 1e-3
    assert_matches(inputs, make_state(inputs, 1), 2e-5)


def test_inputs_need_not_be_contiguous():
    inputs = make_inputs(5, heads=2, kv_heads=2)
    expected = results(inputs, None, backend="triton")
    strided = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for name, x in inputs.items()
    }
    found = results(strided, None, backend="triton")
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_recurrent_form(dtype):
    inputs = make_inputs(3, dtype, batch=2, heads=2, widths=(20, 33))
    inputs = {name: x.detach() for name, x in inputs.items()}
    inputs["log_decay"] = inputs["log_decay"].mT.contiguous().mT
    for state in (None, make_state(inputs, 2).detach()):
        given = {"initial_state": state, "return_state": True, "scale": 0.7}
        expected, end = chunk_kda(**inputs, **given, backend="reference")
        found, found_end = recurrent_kda(**inputs, **given, backend="triton")
        assert found.dtype == dtype
        error = (found.double() - expected.double()).norm()
        assert error < TOLERANCES[dtype] * expected.double().norm()
        assert (found_end - end).norm() < 1e-6 * end.norm()
    before = state.clone()
    again, same = recurrent_kda(**inputs, **given, backend="triton", in_place=True)
    assert same is state
    assert torch.equal(again, found)
    assert torch.equal(state, found_end)
    assert not torch.equal(state, before)


def test_recurrent_form_with_gradients_runs_the_chunked_kernels():
    inputs = make_inputs(3, heads=2)
    step = recurrent_kda(**inputs, backend="triton")[0]
    whole = chunk_kda(**inputs, backend="reference")[0]
    found, expected = (torch.autograd.grad(x.sum(), inputs["value"])[0] for x in (step, whole))
    torch.testing.assert_close(found, expected)


def test_keys_too_wide_are_refused():
    inputs = make_inputs(3, widths=(257, 16))
    with pytest.raises(ValueError, match=r"key \(width 257\) must have at most 256 channels"):
        chunk_kda(**inputs, backend="triton")


def test_the_step_keeps_what_torch_asks_of_it():
    inputs = {name: x.detach() for name, x in make_inputs(2).items()}
    state = make_state(inputs, 1).detach()
    torch.library.opcheck(OPERATOR.step, (*inputs.values(), state, None, 0.7, 64, "triton"))
