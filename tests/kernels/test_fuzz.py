"""200 random shapes and options of every operation, its Triton kernels against the recurrence.

The draws are the same in every run. Errors are relative to each result's own size, but for what
cancels to nothing.
"""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from supra.kernels import launch
from tests.kernels import test_causal_conv as convolution
from tests.kernels import test_gated_delta_rule_triton as delta
from tests.kernels import test_gated_linear_attention_triton as gated
from tests.kernels import test_linear_attention_triton as linear

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
DECAYS = (0.0, 0.1, 1.0, 30.0, 1e5)  # times the logs of a test's decay, which are -0.3 at the most

cases = hypothesis.settings(max_examples=200, deadline=None, derandomize=True)


class Draw:
    """A shape, and sequences that are rows of a batch or packed into one."""

    def __init__(self, data, longest=140):
        self.draw = data.draw
        self.dtype = self.one_of(*TOLERANCES)
        self.tolerance = TOLERANCES[self.dtype]
        self.kv_heads, self.group = self.between(1, 2), self.between(1, 2)
        self.heads = self.kv_heads * self.group
        self.widths = self.between(1, 40), self.between(1, 80)
        lengths = self.draw(st.lists(st.integers(0, longest), min_size=1, max_size=3).filter(any))
        packed = self.one_of(True, False)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0) if packed else None
        self.batch, self.length = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
        self.sequences = len(lengths)
        self.seed = self.between(0, 999)
        self.target = launch.target(self.one_of(*launch.TARGETS))

    def one_of(self, *choices):
        return self.draw(st.sampled_from(choices))

    def between(self, least, most):
        return self.draw(st.integers(least, most))

    def weaken(self, log_decay):
        with torch.no_grad():
            log_decay *= self.one_of(*DECAYS)


def assert_close(found, expected, tolerance):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).norm()
        size = b.double().norm().clamp(min=1e-2 * b.numel() ** 0.5)
        assert error <= tolerance * size, f"result {i}: relative error {error / size:.1e}"


@pytest.mark.long
@cases
@hypothesis.given(st.data())
def test_linear_attention(data):
    draw, module = Draw(data), linear
    decay, normalize = draw.one_of(*module.FORMS)
    inputs = module.make_inputs(
        draw.batch, draw.length, draw.heads, draw.kv_heads, *draw.widths, decay, draw.dtype,
        draw.seed,
    )  # fmt: skip
    if decay is not None:
        draw.weaken(inputs["log_decay"])
    state = draw.one_of(None, module.make_state(inputs, normalize, draw.sequences))
    with draw.target:
        module.assert_matches(
            inputs, state, draw.tolerance, cu_seqlens=draw.cu_seqlens, eps=1e-3,
            normalize=normalize, scale=draw.one_of(1.0, 0.1),
        )  # fmt: skip


@pytest.mark.long
@cases
@hypothesis.given(st.data())
def test_gated_linear_attention(data):
    draw, module = Draw(data, longest=100), gated
    inputs = module.make_inputs(
        draw.batch, draw.length, draw.heads, draw.kv_heads, *draw.widths,
        draw.one_of(*module.KINDS), draw.dtype, draw.sequences,
    )  # fmt: skip
    draw.weaken(inputs["log_decay"])
    with draw.target:
        found = module.run_with_gradients(inputs, "triton", None, cu_seqlens=draw.cu_seqlens)
    expected = module.run_with_gradients(
        inputs, "reference", torch.float64, cu_seqlens=draw.cu_seqlens
    )
    assert_close(found, expected, draw.tolerance)


@pytest.mark.long
@cases
@hypothesis.given(st.data())
def test_gated_delta_rule(data):
    draw, module = Draw(data), delta
    decay = draw.one_of(None, "head", "token")
    inputs = module.make_inputs(
        draw.length, decay, draw.dtype, batch=draw.batch, heads=draw.heads,
        kv_heads=draw.kv_heads, widths=draw.widths, seed=draw.seed,
    )  # fmt: skip
    if decay is not None:
        draw.weaken(inputs["log_decay"])
    state = draw.one_of(None, module.make_state(inputs, draw.sequences))
    with draw.target:
        module.assert_matches(
            inputs, state, draw.tolerance, cu_seqlens=draw.cu_seqlens, scale=draw.one_of(1.0, 0.1)
        )


@pytest.mark.long
@cases
@hypothesis.given(st.data())
def test_causal_conv(data):
    draw, module = Draw(data), convolution
    inputs = module.make_inputs(
        draw.batch, draw.length, draw.between(1, 90), draw.between(1, 9), draw.one_of(True, False),
        draw.dtype, draw.sequences, draw.seed,
    )  # fmt: skip
    options = {"activation": draw.one_of(None, "silu"), "cu_seqlens": draw.cu_seqlens}
    exact = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    expected = module.run_with_gradients(*exact, **options, backend="reference")
    with draw.target:
        found = module.run_with_gradients(*inputs, **options, backend="triton")
    assert_close(found, expected, draw.tolerance)
