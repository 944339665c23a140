"""The causal convolution: every form against the float64 recurrence, and each promise of the
contract."""

import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F

from supra.kernels.causal_conv import causal_conv, causal_conv_step
from supra.kernels.causal_conv.api import OPERATOR

OPTIONS = tuple(product((False, True), (None, "silu")))  # with bias, activation
# taps, sequence bounds or None for a batch; sequences shorter than W - 1, empty and one-token ones
SHAPES = (
    (4, None),
    (1, None),
    (4, [0, 0, 1, 3, 20, 20, 37]),
    (7, [0, 37]),
    (64, [0, 1, 36, 37]),
)


def make_inputs(batch, length, width, taps, bias=True, dtype=torch.float64, sequences=None, seed=0):
    """input, weight, bias or None, state; all with requires_grad."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    state = normal(sequences or batch, taps - 1, width)
    return (
        normal(batch, length, width),
        normal(width, taps),
        normal(width) if bias else None,
        state,
    )


def run_with_gradients(input, weight, bias, state, **options):
    """Output, final state and the gradients of a fixed mixture of them wrt all inputs."""
    results = causal_conv(input, weight, bias, initial_state=state, return_state=True, **options)
    loss = sum((x.double() * probe_like(x)).sum() for x in results)
    leaves = [x for x in (input, weight, bias, state) if x is not None]
    return [*results, *torch.autograd.grad(loss, leaves)]


def probe_like(x):
    generator = torch.Generator().manual_seed(x.numel())
    return torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.3


def assert_close(found, expected, tolerance):
    """By root mean square."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-2)
        assert error < tolerance, f"result {i}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-14),
        (torch.float32, 4e-7),
        (torch.float16, 5e-4),
        (torch.bfloat16, 3e-3),  # what rounding the results to it costs
    ],
    ids=str,
)
@pytest.mark.parametrize(("bias", "activation"), OPTIONS)
def test_results_and_gradients_agree_with_the_reference(dtype, tolerance, bias, activation):
    for taps, bounds in SHAPES:
        batch, sequences = (2, 2) if bounds is None else (1, len(bounds) - 1)
        inputs = make_inputs(batch, 37, 11, taps, bias, dtype, sequences)
        options = {"activation": activation}
        if bounds is not None:
            options["cu_seqlens"] = torch.tensor(bounds)
        exact = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
        expected = run_with_gradients(*exact, **options, backend="reference")
        found = run_with_gradients(*inputs, **options)
        assert [x.dtype for x in found] == [dtype] * len(found)
        assert_close(found, expected, tolerance)
        without = run_with_gradients(*inputs[:3], None, **options)
        expected = run_with_gradients(*exact[:3], None, **options, backend="reference")
        assert_close(without, expected, tolerance)


@pytest.mark.parametrize(("bias", "activation"), OPTIONS)
def test_weight_is_laid_out_as_that_of_conv1d(bias, activation):
    input, weight, bias, _ = make_inputs(2, 20, 6, 4, bias)
    expected = F.conv1d(input.mT, weight[:, None], bias, padding=3, groups=6)[..., :20].mT
    expected = expected if activation is None else F.silu(expected)
    found, _ = causal_conv(input, weight, bias, activation=activation)
    assert_close([found], [expected], 1e-14)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", [1, 4])
def test_gradcheck(taps, activation):
    for length in (2, 5):  # shorter than the state, and longer
        inputs = make_inputs(2, length, 3, taps)

        def run(input, weight, bias, state):
            return causal_conv(
                input, weight, bias, initial_state=state, return_state=True, activation=activation
            )

        assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_old_state_passes_through_a_short_sequence(length, activation):
    inputs = make_inputs(2, length, 5, 4)
    _, end = causal_conv(
        *inputs[:3], initial_state=inputs[3], return_state=True, activation=activation
    )
    expected = torch.cat((inputs[3], inputs[0]), 1)[:, -3:]
    assert torch.equal(end, expected)
    found = torch.autograd.grad(end.sum(), (inputs[0], inputs[3]))
    assert torch.equal(found[0], torch.ones_like(inputs[0]))
    assert found[1].sum(1).eq(3 - length).all() and found[1][:, :length].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 21])
def test_a_run_in_parts_is_one_run_to_the_last_bit(width, dtype):
    input, weight, bias, state = make_inputs(2, 50, width, 4, dtype=dtype)
    whole, end = causal_conv(input, weight, bias, initial_state=state, return_state=True)
    for cuts in ([0, 1, 50], [0, 2, 4, 37, 50]):
        parts, carried = [], state
        for begin, stop in pairwise(cuts):
            part, carried = causal_conv(
                input[:, begin:stop], weight, bias, initial_state=carried, return_state=True
            )
            parts.append(part)
        assert torch.equal(torch.cat(parts, 1), whole)
        assert torch.equal(carried, end)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_steps_are_one_run(taps, in_place):
    input, weight, bias, state = (x.detach() for x in make_inputs(2, 9, 16, taps))
    whole, end = causal_conv(
        input, weight, bias, activation="silu", initial_state=state, return_state=True
    )
    given, before = state, state.clone()
    for t in range(9):
        token = input[:, t] if t % 2 else input[:, t : t + 1]
        output, state = causal_conv_step(
            token, weight, bias, state=state, activation="silu", in_place=in_place
        )
        assert output.shape == token.shape
        assert_close([output.view(2, 16)], [whole[:, t]], 1e-15)
    assert torch.equal(state, end)
    assert (state is given) == in_place
    assert in_place or torch.equal(given, before)


def test_a_step_in_place_agrees_with_the_reference():
    input, weight, bias, state = (x.detach() for x in make_inputs(2, 1, 5, 4, dtype=torch.float32))
    results = [
        causal_conv_step(
            input, weight, bias, state=state.clone(), activation="silu", in_place=True, backend=name
        )
        for name in ("torch", "reference")
    ]
    assert_close(*results, 2e-7)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_packed_sequences_are_the_same_as_separate_ones(activation):
    bounds = [0, 0, 1, 20, 20, 22, 37]
    input, weight, bias, state = make_inputs(1, 37, 5, 4, sequences=6)
    found = causal_conv(
        input, weight, bias, activation=activation, initial_state=state, return_state=True,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
    )  # fmt: skip
    for n, (begin, stop) in enumerate(pairwise(bounds)):
        if begin == stop:
            assert torch.equal(found[1][n], state[n])
            continue
        output, end = causal_conv(
            input[:, begin:stop], weight, bias, activation=activation,
            initial_state=state[n : n + 1], return_state=True,
        )  # fmt: skip
        assert_close([found[0][:, begin:stop], found[1][n : n + 1]], [output, end], 1e-15)


def test_no_gradient_flows_from_the_past_to_the_future():
    input, weight, bias, _ = make_inputs(1, 20, 5, 4)
    output, _ = causal_conv(input, weight, bias, activation="silu")
    for t in (0, 2, 3, 18):
        (gradient,) = torch.autograd.grad(output[:, t].sum(), input, retain_graph=True)
        assert gradient[:, t + 1 :].eq(0).all() and gradient[:, : max(0, t - 3)].eq(0).all()
        assert gradient[:, max(0, t - 3) : t + 1].ne(0).all()


def test_many_blocks_of_rows_are_one_run(monkeypatch):
    from supra.kernels.causal_conv import torch as torch_backend

    inputs = make_inputs(1, 37, 5, 4, sequences=4)
    options = {"activation": "silu", "cu_seqlens": torch.tensor([0, 9, 10, 16, 37])}
    expected = run_with_gradients(*inputs, **options)
    for rows in (1, 2, 8):
        monkeypatch.setattr(torch_backend, "BLOCK", 5 * rows)
        assert_close(run_with_gradients(*inputs, **options), expected, 1e-14)


def test_autocast_changes_nothing():
    inputs = make_inputs(1, 20, 16, 4, dtype=torch.float32)
    expected = run_with_gradients(*inputs, activation="silu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_with_gradients(*inputs, activation="silu")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_float32_parameters_serve_16_bit_inputs():
    exact = make_inputs(2, 20, 5, 4, dtype=torch.bfloat16)
    parameters = [x.detach().float().requires_grad_() for x in exact[1:3]]
    expected = run_with_gradients(*exact, activation="silu")
    found = run_with_gradients(exact[0], *parameters, exact[3], activation="silu")
    dtypes = [torch.bfloat16] * 3 + [torch.float32] * 2 + [torch.bfloat16]
    assert [x.dtype for x in found] == dtypes
    assert_close(found, expected, 3e-3)


@pytest.mark.parametrize("batch", [1, 2])
def test_inputs_need_not_be_contiguous(batch):
    inputs = make_inputs(batch, 20, 6, 4)
    expected = run_with_gradients(*inputs, activation="silu")
    input, weight, state = (
        x.detach().mT.contiguous().mT.requires_grad_() for x in (inputs[0], inputs[1], inputs[3])
    )
    found = run_with_gradients(input, weight, inputs[2], state, activation="silu")
    assert_close(found, expected, 1e-14)
    assert all(x.is_contiguous() for x in found)
    wide = torch.cat([inputs[0].detach()] * 2, -1)
    assert_close(causal_conv(wide[..., 6:], weight)[:1], causal_conv(input, weight)[:1], 1e-14)


def test_meta_device_gives_shapes():
    inputs = [x.to("meta") for x in make_inputs(2, 20, 6, 4, dtype=torch.bfloat16)]
    output, end = causal_conv(*inputs[:3], initial_state=inputs[3], return_state=True)
    assert (output.shape, output.dtype) == ((2, 20, 6), torch.bfloat16)
    assert (end.shape, end.dtype) == ((2, 3, 6), torch.bfloat16)


@pytest.mark.parametrize("bounds", [None, [0, 1, 1, 9]])
def test_custom_op_is_sound(bounds):
    sequences = 2 if bounds is None else 3
    inputs = make_inputs(2 if bounds is None else 1, 9, 5, 4, sequences=sequences)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    for silu in (False, True):
        torch.library.opcheck(OPERATOR.forward, (*inputs, cu_seqlens, silu, "torch"))


def test_compiles_without_a_graph_break():
    inputs = make_inputs(1, 9, 5, 4, dtype=torch.float32)
    compiled = torch.compile(causal_conv, backend="eager", fullgraph=True)
    options = {"activation": "silu", "initial_state": inputs[3], "return_state": True}
    assert_close(compiled(*inputs[:3], **options), causal_conv(*inputs[:3], **options), 1e-6)


def test_state_is_returned_only_on_request():
    input, weight, bias, _ = make_inputs(1, 3, 5, 4)
    assert causal_conv(input, weight, bias)[1] is None


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from supra.kernels.causal_conv import causal_conv as f;"
        "assert f(torch.ones(1, 3, 1), torch.ones(1, 2))[0][0, :, 0].tolist() == [1, 2, 2]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
