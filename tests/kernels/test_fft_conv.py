"""Convolution by Fourier transforms: against the sum that it is, tap by tap in float64."""

from itertools import pairwise, product

import pytest
import torch

from supra.kernels.long_conv import fft, fft_conv
from supra.kernels.long_conv.inputs import FftInputs
from tests.kernels.test_long_conv import assert_close, run_with_gradients


def make_inputs(batch, length, heads, width, taps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.5

    wide = torch.promote_types(dtype, torch.float32)
    inputs = {
        "input": uniform(batch, length, heads, width).to(dtype),
        "kernel": uniform(heads, taps).to(wide),
    }
    state = uniform(batch, taps - 1, heads, width).to(wide)
    return {name: x.requires_grad_() for name, x in inputs.items()}, state.requires_grad_()


def direct(input, kernel, initial_state, return_state=True):
    """Every tap by itself, on outputs that reach as far as the kernel does."""
    length, rest = input.shape[1], kernel.shape[1] - 1
    shape = (input.shape[0], length + rest, *input.shape[2:])
    full = torch.zeros(shape, dtype=torch.float64)
    full[:, :rest] += initial_state
    for i in range(kernel.shape[1]):
        full[:, i : i + length] += kernel[:, i, None] * input
    return full[:, :length], full[:, length:]


# kernels shorter and longer than the sequence, of one tap; blocks that do not divide the length
@pytest.mark.parametrize("block_size", [None, 1, 7, 16])
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (1, 9), (20, 1), (37, 5), (16, 16), (9, 40)])
def test_it_is_the_sum_with_its_gradients(length, taps, block_size):
    inputs, state = make_inputs(2, length, 3, 2, taps)
    expected = run_with_gradients(direct, inputs, state)
    found = run_with_gradients(fft_conv, inputs, state, block_size=block_size)
    assert_close(found, expected, 1e-13)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 5e-7), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)],
)
def test_it_computes_in_float32(dtype, tolerance):
    inputs, state = make_inputs(1, 300, 2, 1, 300, dtype)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = run_with_gradients(direct, exact, state.detach().double().requires_grad_())
    found = run_with_gradients(fft_conv, inputs, state, block_size=64)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    assert_close(found, expected, tolerance)


def test_nothing_wraps_around():
    # the last input must not reach the first outputs, however long the kernel; zero to the last bit
    # would be too much to ask of a transform
    inputs, _ = make_inputs(1, 64, 1, 1, 64)
    last = torch.zeros(1, 64, 1, 1, dtype=torch.float64)
    last[:, -1] = 1
    for block_size in (None, 16, 63):
        output, end = fft_conv(last, inputs["kernel"], return_state=True, block_size=block_size)
        assert output[:, :-1].abs().max() < 1e-15
        both = torch.cat((output[0, -1:, 0, 0], end[0, :, 0, 0]))
        torch.testing.assert_close(both, inputs["kernel"][0])


def test_no_gradient_flows_from_the_past_to_the_future():
    inputs, _ = make_inputs(1, 40, 2, 1, 40)
    output, _ = fft_conv(**inputs, block_size=16)
    for t in (0, 15, 16, 38):
        (gradient,) = torch.autograd.grad(output[:, t].sum(), inputs["input"], retain_graph=True)
        assert gradient[:, t + 1 :].abs().max() < 1e-15
        assert torch.all(gradient[:, : t + 1] != 0)


@pytest.mark.parametrize("cut", [1, 20, 36])
def test_two_segments_with_carried_state_are_one_run(cut):
    inputs, state = make_inputs(2, 37, 3, 2, 25)
    expected = run_with_gradients(fft_conv, inputs, state)

    def segments(input, kernel, initial_state, return_state):
        head, middle = fft_conv(
            input[:, :cut], kernel, initial_state=initial_state, return_state=True
        )
        tail, end = fft_conv(input[:, cut:], kernel, initial_state=middle, return_state=True)
        return torch.cat((head, tail), 1), end

    assert_close(run_with_gradients(segments, inputs, state), expected, 1e-13)


def test_packed_sequences_are_the_same_as_separate_ones():
    bounds = [0, 0, 1, 20, 20, 53]
    inputs, _ = make_inputs(1, bounds[-1], 3, 2, 9)
    _, state = make_inputs(len(bounds) - 1, 1, 3, 2, 9)

    def separate(input, kernel, initial_state, return_state):
        outputs, states = [], []
        for n, (begin, stop) in enumerate(pairwise(bounds)):
            end = initial_state[n : n + 1]
            if begin < stop:
                output, end = fft_conv(
                    input[:, begin:stop], kernel, initial_state=end, return_state=True
                )
                outputs.append(output)
            states.append(end)
        return torch.cat(outputs, 1), torch.cat(states)

    expected = run_with_gradients(separate, inputs, state)
    found = run_with_gradients(fft_conv, inputs, state, cu_seqlens=torch.tensor(bounds))
    assert_close(found, expected, 1e-13)


def test_gradcheck():
    inputs, state = make_inputs(1, 6, 2, 1, 4)

    def run(input, kernel, initial_state):
        return fft_conv(input, kernel, initial_state=initial_state, return_state=True, block_size=4)

    assert torch.autograd.gradcheck(run, (*inputs.values(), state), fast_mode=False)


def test_groups_of_heads_do_not_show(monkeypatch):
    inputs, state = make_inputs(2, 20, 5, 1, 7)
    expected = run_with_gradients(fft_conv, inputs, state)
    monkeypatch.setattr(fft, "WORK", 2 * 32)
    assert_close(run_with_gradients(fft_conv, inputs, state, block_size=26), expected, 1e-13)


def test_meta_device_gives_shapes():
    inputs, _ = make_inputs(2, 7, 3, 2, 5, torch.bfloat16)
    output, end = fft_conv(*(x.to("meta") for x in inputs.values()), return_state=True)
    assert (output.shape, output.dtype) == ((2, 7, 3, 2), torch.bfloat16)
    assert (end.shape, end.dtype) == ((2, 4, 3, 2), torch.float32)


MISTAKES = {
    "input (shape [2, 7, 3]) must be [B, T, H, D]": {"input": torch.zeros(2, 7, 3)},
    "input (shape [0, 7, 3, 2]) must have at least one row and one token": {
        "input": torch.zeros(0, 7, 3, 2)
    },
    "input (shape [2, 0, 3, 2]) must have at least one row and one token": {
        "input": torch.zeros(2, 0, 3, 2)
    },
    "kernel (shape [2, 5]) must be [3, L] to fit input": {"kernel": torch.zeros(2, 5)},
    "kernel (dtype torch.int64) must be floating": {"kernel": torch.zeros(3, 5, dtype=torch.long)},
    "initial_state (shape [2, 5, 3, 2]) must be [2, 4, 3, 2] [N, L - 1, H, D]": {
        "initial_state": torch.zeros(2, 5, 3, 2)
    },
    "block_size (=0) must be >= 1": {"block_size": 0},
    "input (batch 2) must have one row when cu_seqlens": {"cu_seqlens": torch.tensor([0, 7])},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    given = {"input": torch.zeros(2, 7, 3, 2), "kernel": torch.zeros(3, 5)}
    with pytest.raises(ValueError) as error:
        fft_conv(**given | MISTAKES[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_blocks_of_any_size_hold_block_and_tail():
    for length, taps, block_size in product((1, 5, 3000), (1, 7, 2000), (None, 1, 100)):
        input, kernel = torch.empty(1, length, 1, 1), torch.empty(1, taps)
        block, size = fft._sizes(FftInputs(input, kernel, None, None, block_size))
        assert size >= block + taps - 1
        assert block >= 1
