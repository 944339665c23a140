"""The Triton kernels of the long convolution, interpreted on a CPU, against float64 by token."""

import pytest
import torch

from supra.kernels.long_conv import chunk_ssm_conv, recurrent_ssm_conv
from supra.kernels.long_conv.api import OPERATOR
from tests.kernels.test_long_conv import BY_TOKEN, MODEL, make_inputs, make_state, probe_like

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}


def make_all(
    batch, length, heads, widths, modes, dtype, sequences=None, skip=True, state=True, seed=0
):
    inputs = make_inputs(batch, length, heads, widths, modes, dtype, seed, skip)
    if state:
        inputs["initial_state"] = make_state(inputs, sequences)
    return {name: x if x is None else x.detach() for name, x in inputs.items()}


def run_with_gradients(inputs, backend, dtype=None, **options):
    """Output, final state and the gradients of a fixed mixture of them wrt all inputs, by name."""
    leaves = {
        name: x if x is None else x.to(dtype or x.dtype).detach().requires_grad_()
        for name, x in inputs.items()
    }
    results = chunk_ssm_conv(**leaves, return_state=True, backend=backend, **options)
    loss = sum((x.double() * probe_like(x)).sum() for x in results)
    present = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(loss, list(present.values()))
    return dict(zip(("output", "end", *present), (*results, *gradients), strict=True))


def assert_close(found, expected, tolerance):
    for name, b in expected.items():
        a = found[name]
        assert a.shape == b.shape
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


# heads of width 1, with and without gates, wide ones and odd ones; a chunk, and chunks and a bit
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (2, 70, 5, (1, 1), 5)),
        (torch.float32, (1, 130, 2, (None, 1), 9)),
        (torch.float32, (1, 66, 2, (3, 5), 3)),
        (torch.float32, (1, 64, 1, (8, 8), 2)),
        (torch.float16, (1, 67, 3, (1, 1), 4)),
        (torch.float16, (1, 40, 2, (4, 4), 4)),
        (torch.bfloat16, (2, 140, 3, (1, 1), 33)),
        (torch.bfloat16, (1, 65, 2, (None, 3), 4)),
        (torch.bfloat16, (1, 70, 1, (4, 4), 4)),
    ],
)
def test_chunks_agree_with_the_reference(dtype, shape):
    inputs = make_all(*shape, dtype)
    expected = run_with_gradients(inputs, "reference", torch.float64)
    found = run_with_gradients(inputs, "triton")
    assert (found["output"].dtype, found["end"].dtype) == (dtype, torch.float32)
    assert_close(found, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("widths", [(1, 1), (2, 3)])
def test_packed_sequences(widths):
    bounds = [0, 0, 1, 66, 66, 130, 140]
    inputs = make_all(1, bounds[-1], 2, widths, 3, torch.float32, len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds)
    expected = run_with_gradients(inputs, "reference", torch.float64, cu_seqlens=cu_seqlens)
    found = run_with_gradients(inputs, "triton", cu_seqlens=cu_seqlens)
    assert_close(found, expected, TOLERANCES[torch.float32])


def test_modes_that_forget_at_once_and_ones_that_never_do():
    inputs = make_all(1, 130, 2, (1, 1), 5, torch.float32)
    inputs["log_decay"][:] = torch.tensor([0, -torch.inf, -1e4, -3, -80.0])
    expected = run_with_gradients(inputs, "reference", torch.float64)
    assert_close(run_with_gradients(inputs, "triton"), expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("skip", [True, False])
def test_no_state_is_zeros(skip):
    inputs = make_all(1, 3, 2, (2, 2), 3, torch.float32, skip=skip, state=False)
    expected = run_with_gradients(inputs, "reference", torch.float64)
    assert_close(run_with_gradients(inputs, "triton"), expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("widths", [(None, 1), (1, 1), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_agree_with_the_reference(widths, dtype):
    inputs = make_all(2, 4, 3, widths, 5, dtype)
    expected = recurrent_ssm_conv(**inputs, return_state=True, backend="reference")
    state = inputs["initial_state"].clone()
    for in_place in (False, True):
        found = recurrent_ssm_conv(**inputs, return_state=True, backend="triton", in_place=in_place)
        assert found[0].dtype == dtype
        for a, b in zip(found, expected, strict=True):
            assert (a.double() - b.double()).norm() <= 3e-7 * b.double().norm()
        assert torch.equal(inputs["initial_state"], found[1] if in_place else state)


def test_recurrent_form_with_gradients_runs_the_chunked_kernels():
    inputs = make_all(1, 3, 2, (1, 1), 3, torch.float32)
    inputs["value"].requires_grad_()
    step, _ = recurrent_ssm_conv(**inputs, backend="triton")
    whole, _ = chunk_ssm_conv(**inputs, backend="reference")
    found, expected = (torch.autograd.grad(x.sum(), inputs["value"])[0] for x in (step, whole))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_inputs_need_not_be_contiguous():
    inputs = make_all(2, 5, 3, (4, 4), 3, torch.float32)
    strided = {
        name: x.mT.contiguous().mT if name in (*BY_TOKEN, "initial_state") else x
        for name, x in inputs.items()
    }
    for function in (chunk_ssm_conv, recurrent_ssm_conv):
        expected, _ = function(**inputs, backend="triton")
        found, _ = function(**strided, backend="triton")
        assert torch.equal(found, expected)


def test_custom_ops_are_sound():
    inputs = make_all(1, 5, 2, (2, 3), 3, torch.float32, 2)
    given = [inputs[name] for name in (*BY_TOKEN, *MODEL, "initial_state")]
    arguments = (*given, torch.tensor([0, 3, 5]), 64, "triton")
    torch.library.opcheck(OPERATOR.forward, arguments)
    output, end = OPERATOR.forward(*arguments)
    torch.library.opcheck(OPERATOR.backward, (output, end, *arguments))
    step = (*(x[:, :1] for x in given[:3]), *given[3:7], end[:1], None, *arguments[-2:])
    torch.library.opcheck(OPERATOR.step, step)
