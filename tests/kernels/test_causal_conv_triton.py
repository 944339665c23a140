"""The convolution's Triton kernels, interpreted on the CPU."""

import pytest
import torch

from supra.kernels import launch
from supra.kernels.causal_conv import causal_conv, causal_conv_step
from supra.kernels.causal_conv.api import OPERATOR
from supra.kernels.causal_conv.inputs import Inputs
from tests.kernels.test_causal_conv import assert_close, make_inputs, run_with_gradients

pytest.importorskip("triton", reason="the kernels are written in Triton")

TOLERANCES = {torch.float32: 4e-7, torch.float16: 6e-4, torch.bfloat16: 6e-3}
# length, channels, taps, bounds: two tiles of tokens and of channels, and less than a state
SHAPES = (
    (70, 72, 4, None),
    (2, 7, 4, None),
    (5, 7, 1, None),
    (66, 16, 3, [0, 0, 1, 65, 65, 66]),
    (9, 5, 12, [0, 2, 9]),
)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_results_and_gradients_agree_with_the_reference(activation, dtype):
    for length, width, taps, bounds in SHAPES:
        batch, sequences = (2, 2) if bounds is None else (1, len(bounds) - 1)
        inputs = make_inputs(batch, length, width, taps, True, dtype, sequences)
        options = {"activation": activation}
        if bounds is not None:
            options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        expected = run_with_gradients(*exact, **options, backend="reference")
        found = run_with_gradients(*inputs, **options, backend="triton")
        assert [x.dtype for x in found] == [dtype] * len(found)
        assert_close(found, expected, TOLERANCES[dtype])


def test_bias_and_state_may_be_absent():
    input, weight, _, _ = make_inputs(2, 9, 7, 4, dtype=torch.float32)
    results = [
        run_with_gradients(input, weight, None, None, activation="silu", backend=name)
        for name in ("triton", "reference")
    ]
    assert_close(*results, 4e-7)


def test_a_run_in_parts_is_one_run_to_the_last_bit():
    input, weight, bias, state = make_inputs(1, 66, 7, 4, dtype=torch.float32)
    options = {"activation": "silu", "return_state": True, "backend": "triton"}
    whole, end = causal_conv(input, weight, bias, initial_state=state, **options)
    head, state = causal_conv(input[:, :65], weight, bias, initial_state=state, **options)
    tail, state = causal_conv(input[:, 65:], weight, bias, initial_state=state, **options)
    assert torch.equal(torch.cat((head, tail), 1), whole)
    assert torch.equal(state, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taps", [1, 4])
def test_a_step_in_place_is_the_last_token_of_a_run(taps, dtype):
    input, weight, bias, state = (x.detach() for x in make_inputs(2, 3, 300, taps, dtype=dtype))
    options = {"activation": "silu", "backend": "triton"}
    whole, end = causal_conv(input, weight, bias, initial_state=state, return_state=True, **options)
    for t in range(3):
        output, found = causal_conv_step(
            input[:, t], weight, bias, state=state, in_place=True, **options
        )
        assert found is state
        assert torch.equal(output, whole[:, t])
    assert torch.equal(state, end)


def test_inputs_may_be_slices():
    input, weight, _, _ = make_inputs(2, 9, 16, 4, dtype=torch.float32)
    wide = torch.cat((input, input), -1)[..., 16:]
    transposed = input.detach().mT.contiguous().mT
    expected = causal_conv(input, weight, backend="triton")[0]
    for same in (wide, transposed):
        assert torch.equal(causal_conv(same, weight, backend="triton")[0], expected)


@pytest.mark.parametrize("bounds", [None, [0, 1, 1, 9]])
def test_custom_ops_are_sound(bounds):
    sequences = 2 if bounds is None else 3
    batch = 2 if bounds is None else 1
    inputs = make_inputs(batch, 9, 5, 4, dtype=torch.float32, sequences=sequences)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    torch.library.opcheck(OPERATOR.forward, (*inputs, cu_seqlens, True, "triton"))
    input, weight, bias, state = (x.detach() for x in inputs)
    if bounds is None:
        torch.library.opcheck(
            OPERATOR.step, (input[:, :1], weight, bias, state, None, True, "triton")
        )


def test_launches_can_be_listed_without_a_device():
    from supra.kernels.causal_conv import triton as backend

    input, weight, bias, state = (
        x.to("meta") for x in make_inputs(1, 9, 64, 4, dtype=torch.float32, sequences=3)
    )
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    with launch.recording() as launches:
        inputs = Inputs(input, weight, bias, state, cu_seqlens, True, "triton")
        output, end = backend.forward(inputs)
        backend.backward(inputs, output, end)
        backend.recurrent(Inputs(input[:, :1], weight, bias, state[:1], None, True, "triton"))
    names = [x.kernel.__name__ for x in launches]
    assert names == ["forward", "backward_sums", "backward_window", "step"]
