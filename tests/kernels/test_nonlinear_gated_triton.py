"""The nonlinear gated recurrence's Triton kernels, interpreted, against the float64 loop."""

import pytest
import torch
import triton
import triton.language as tl

from supra.kernels import launch
from supra.kernels.nonlinear_gated import (
    chunk_nonlinear_gated,
    recurrent_nonlinear_gated,
    triton_newton,
)
from supra.kernels.nonlinear_gated.api import OPERATOR

CONTRACTING, BISTABLE = 0.9, 2.4  # largest |a|
SOLVED = 1e-6  # the default tolerance of the residual

# relative, where the dynamics forget; 16 bits round results and gradients
TOLERANCES = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def make_inputs(
    batch, length, heads, width, value_width, largest, dtype=torch.float32, sequences=None, seed=0
):
    """query, key, value, log_decay, weight and initial_state; rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "query": uniform(batch, length, heads, width) * 2 - 1,
        "key": uniform(batch, length, heads, width) * 2 - 1,
        "value": uniform(batch, length, heads, value_width) * 2 - 1,
        "log_decay": -4 * uniform(batch, length, heads) ** 4,
        "weight": (uniform(heads, width, value_width) * 2 - 1) * largest,
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    state = uniform(sequences or batch, heads, width, value_width) * 3 - 1.5
    return inputs | {"initial_state": state.float()}


def run_with_gradients(inputs, backend, dtype, **options):
    """Output, final state and the gradients of a fixed mixture of them wrt all inputs."""
    leaves = {name: x.to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
    results = chunk_nonlinear_gated(
        **leaves, return_state=True, scale=0.7, backend=backend, **options
    )
    generator = torch.Generator().manual_seed(1)
    probes = [torch.rand(x.shape, generator=generator, dtype=torch.float64) for x in results]
    loss = sum((x.double() * (probe - 0.3)).sum() for x, probe in zip(results, probes, strict=True))
    return [*results, *torch.autograd.grad(loss, list(leaves.values()))]


def assert_close(found, expected, tolerance):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)
        assert error <= tolerance, f"result {i}: relative error {error:.1e}"


# odd widths, several blocks of keys and of values; one chunk and a bit; chunks of one token
@pytest.mark.parametrize(
    ("largest", "dtype", "shape", "chunk_size", "target"),
    [
        (CONTRACTING, torch.float32, (1, 18, 2, 5, 20), None, "sm_90"),
        (BISTABLE, torch.float32, (2, 33, 1, 20, 5), None, "sm_100"),
        (BISTABLE, torch.float32, (1, 9, 1, 70, 5), 8, "sm_90"),
        (CONTRACTING, torch.float32, (1, 3, 1, 5, 4), 1, "sm_100"),
        (CONTRACTING, torch.bfloat16, (2, 17, 1, 16, 12), None, "sm_90"),
        (CONTRACTING, torch.float16, (1, 17, 2, 12, 16), None, "sm_100"),
    ],
)
def test_chunks_agree_with_the_reference(largest, dtype, shape, chunk_size, target):
    inputs = make_inputs(*shape, largest, dtype)
    expected = run_with_gradients(inputs, "reference", torch.float64)
    with launch.target(target):
        found = run_with_gradients(inputs, "triton", None, chunk_size=chunk_size)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    assert_close(found, expected, TOLERANCES[dtype])


def test_packed_sequences_resets_and_slow_gates():
    bounds = [0, 0, 1, 34, 34, 40, 40]
    inputs = make_inputs(1, bounds[-1], 2, 8, 5, BISTABLE, sequences=len(bounds) - 1)
    inputs["log_decay"][:, [0, 9, 10, 34]] = -1e4
    inputs["log_decay"][:, ::7, 0] = -torch.inf
    inputs["log_decay"][:, 20:30] *= 1e-5
    cu_seqlens = torch.tensor(bounds)
    expected = run_with_gradients(inputs, "reference", torch.float64, cu_seqlens=cu_seqlens)
    found = run_with_gradients(inputs, "triton", None, cu_seqlens=cu_seqlens)
    assert_close(found, expected, TOLERANCES[torch.float32])


def test_few_sweeps_do_for_2048_tokens_of_a_contracting_state():
    inputs = make_inputs(1, 2048, 1, 4, 4, CONTRACTING)
    inputs["weight"] = inputs["weight"].sign() * CONTRACTING
    inputs["log_decay"] = -torch.rand(1, 2048, 1, generator=torch.Generator().manual_seed(2)) * 4
    expected, _ = chunk_nonlinear_gated(**inputs, backend="reference")
    found, _, convergence = chunk_nonlinear_gated(
        **inputs, backend="triton", sweeps=1, return_convergence=True
    )
    assert convergence.residual.item() <= SOLVED
    assert 2 <= convergence.sweeps.item() <= 5
    assert_close([found], [expected], TOLERANCES[torch.float32])


def test_a_bistable_state_takes_more_sweeps_and_is_exact():
    # every number alternates between its resting points, or is thrown from one to the other
    inputs = make_inputs(1, 64, 1, 4, 4, BISTABLE)
    inputs["weight"] = inputs["weight"].sign() * BISTABLE
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -4.0)
    expected, _ = chunk_nonlinear_gated(**inputs, backend="reference")
    found, _, convergence = chunk_nonlinear_gated(
        **inputs, backend="triton", return_convergence=True
    )
    assert 6 <= convergence.sweeps.item() <= 16
    assert_close([found], [expected], 1e-5)


def test_what_is_asked_of_the_residual_is_what_sweeps_stop_at():
    inputs = make_inputs(1, 16, 1, 4, 4, BISTABLE)
    options = {"backend": "triton", "return_convergence": True, "sweeps": 1}
    loose = chunk_nonlinear_gated(**inputs, tolerance=0.1, **options)[2]
    tight = chunk_nonlinear_gated(**inputs, tolerance=0.0, **options)[2]
    assert loose.sweeps.item() < tight.sweeps.item() <= 16
    assert tight.residual.item() <= SOLVED


def test_a_nan_is_not_swept_away():
    inputs = make_inputs(1, 40, 1, 4, 4, CONTRACTING)
    inputs["value"][0, 20, 0, 1] = torch.nan
    output, state = chunk_nonlinear_gated(**inputs, return_state=True, backend="triton")
    lost = torch.zeros_like(output, dtype=torch.bool)
    lost[0, 20:, 0, 1] = True
    assert torch.equal(output.isnan(), lost)
    assert torch.equal(state.isnan().any(2), lost[:, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_agree_with_the_reference(dtype):
    inputs = make_inputs(2, 5, 3, 20, 12, BISTABLE, dtype)
    expected = recurrent_nonlinear_gated(**inputs, return_state=True, backend="reference")
    state = inputs["initial_state"].clone()
    for in_place in (False, True):
        found = recurrent_nonlinear_gated(
            **inputs, return_state=True, backend="triton", in_place=in_place
        )
        assert found[0].dtype == dtype
        assert_close(found, expected, 3e-7)
        assert torch.equal(inputs["initial_state"], found[1] if in_place else state)
        assert (found[1].data_ptr() == inputs["initial_state"].data_ptr()) is in_place


def test_recurrent_form_with_gradients_runs_the_chunked_kernels():
    inputs = make_inputs(1, 3, 2, 16, 16, CONTRACTING)
    inputs["weight"].requires_grad_()
    step, _ = recurrent_nonlinear_gated(**inputs, backend="triton")
    whole, _ = chunk_nonlinear_gated(**inputs, backend="reference")
    found, expected = (torch.autograd.grad(x.sum(), inputs["weight"])[0] for x in (step, whole))
    assert_close([found], [expected], TOLERANCES[torch.float32])


def test_no_state_is_zeros():
    inputs = make_inputs(1, 3, 1, 4, 4, CONTRACTING)
    del inputs["initial_state"]
    expected = chunk_nonlinear_gated(**inputs, return_state=True, backend="reference")
    for function in (chunk_nonlinear_gated, recurrent_nonlinear_gated):
        found = function(**inputs, return_state=True, backend="triton")
        assert_close(found, expected, TOLERANCES[torch.float32])


def test_inputs_need_not_be_contiguous():
    inputs = make_inputs(1, 5, 2, 16, 16, CONTRACTING)
    strided = {name: x.mT.contiguous().mT for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    for function in (chunk_nonlinear_gated, recurrent_nonlinear_gated):
        expected, _ = function(**inputs, backend="triton")
        found, _ = function(**strided, backend="triton")
        assert torch.equal(found, expected)


def test_custom_ops_are_sound():
    inputs = make_inputs(1, 5, 2, 20, 12, CONTRACTING, sequences=2)
    tensors, options = (*inputs.values(), torch.tensor([0, 3, 5])), (0.7, 2, 1e-6, 4, True)
    torch.library.opcheck(OPERATOR.forward, (*tensors, *options, "triton"))
    output, end, states, _ = OPERATOR.forward(*tensors, *options, "triton")
    arguments = (output, end, *tensors, states, *options, "triton")
    torch.library.opcheck(OPERATOR.backward, arguments)
    step = [inputs[name][:, :1] for name in ("query", "key", "value", "log_decay")]
    given = (*step, inputs["weight"], end[:1], None, *options, "triton")
    torch.library.opcheck(OPERATOR.step, given)


@triton.jit
def functions(x, tanh, complement, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    given = tl.load(x + i)
    tl.store(tanh + i, triton_newton.tanh(given))
    tl.store(complement + i, triton_newton.one_minus_exp(-tl.abs(given)))


def test_small_numbers_keep_their_digits():
    size = torch.logspace(-8, 2, 512)
    x = torch.cat((size, -size))
    found = torch.empty(2, 1024)
    given = {"x": x, "tanh": found[0], "complement": found[1]}
    launch.launch(functions, (1,), given, launch.Tiling(16, 16), SIZE=1024)
    expected = torch.stack((x.double().tanh(), -torch.expm1(-x.double().abs())))
    assert ((found - expected) / expected).abs().max() < 3e-7
