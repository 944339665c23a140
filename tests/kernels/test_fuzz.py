"""200 random shapes and options of every operation, its Triton kernels against the recurrence.

The draws are the same in every run. What may differ is a share of a result's size and, since some
results cancel (a normalised output of one token does not depend on its query), four roundings of
every number, and what the result moves by when the inputs move by the rounding of their dtype.
"""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from supra.kernels import launch
from supra.kernels.causal_conv import causal_conv
from supra.kernels.gated_delta_rule import chunk_gated_delta_rule
from supra.kernels.gated_linear_attention import chunk_gated_linear_attention
from supra.kernels.kda import chunk_kda
from supra.kernels.linear_attention import LinearAttentionState, chunk_linear_attention
from supra.kernels.long_conv import chunk_ssm_conv
from supra.kernels.nonlinear_gated import chunk_nonlinear_gated
from tests.kernels import test_causal_conv as convolution
from tests.kernels import test_gated_delta_rule_triton as delta
from tests.kernels import test_gated_linear_attention_triton as gated
from tests.kernels import test_kda_triton as kda
from tests.kernels import test_linear_attention_triton as linear
from tests.kernels import test_long_conv_triton as long
from tests.kernels import test_nonlinear_gated_triton as nonlinear

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
DECAYS = (0.0, 0.1, 1.0, 30.0, 1e5)  # times the logs of a test's decay, which are -4 at the most

OPERANDS = ("query", "key", "value", "beta")

cases = hypothesis.settings(max_examples=200, deadline=None, derandomize=True)


class Draw:
    """A shape, and sequences that are rows of a batch or packed into one."""

    def __init__(self, data, longest=140):
        self.draw = data.draw
        self.dtype = self.one_of(*TOLERANCES)
        self.kv_heads, self.group = self.between(1, 2), self.between(1, 2)
        self.heads = self.kv_heads * self.group
        self.widths = self.between(1, 40), self.between(1, 80)
        lengths = self.draw(st.lists(st.integers(0, longest), min_size=1, max_size=3).filter(any))
        packed = self.one_of(True, False)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0) if packed else None
        self.batch, self.length = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
        self.sequences = len(lengths)
        self.seed = self.between(0, 999)
        self.target = self.one_of(*launch.TARGETS)

    def one_of(self, *choices):
        return self.draw(st.sampled_from(choices))

    def between(self, least, most):
        return self.draw(st.integers(least, most))

    def check(self, function, inputs, **options):
        """Compare both backends on inputs by name, of which some may be None."""
        options["cu_seqlens"] = self.cu_seqlens
        with launch.target(self.target):
            found = results(function, inputs, backend="triton", **options)
        exact = {name: x if x is None else x.double() for name, x in inputs.items()}
        expected = results(function, exact, backend="reference", **options)
        moved = [results(function, move(inputs, i), backend="reference", **options) for i in (1, 2)]
        for name, truth in expected.items():
            assert found[name].shape == truth.shape, name
            error = (found[name].double() - truth).norm()
            least = 2 * torch.finfo(self.dtype).eps  # of each number; they are near 1
            allowed = TOLERANCES[self.dtype] * truth.norm() + least * truth.numel() ** 0.5
            allowed += 2 * max((x[name] - truth).norm() for x in moved)
            if name == "d_log_decay" and "d_query" in expected:
                # sums of the products of inputs with their gradients, of which little may be left;
                terms = [(exact[n] * expected[f"d_{n}"]).norm() for n in inputs if n in OPERANDS]
                times = 64 if truth.dim() == 1 else 1  # of all tokens a chunk, up to 128 of them
                allowed += 2 * least * sum(terms) * times
            assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"


def results(function, inputs, **options):
    """All results and every gradient, by name."""
    leaves = {n: x if x is None else x.detach().requires_grad_() for n, x in inputs.items()}
    given = {name: x for name, x in leaves.items() if name != "normalizer"}
    if "normalizer" in leaves and given["initial_state"] is not None:
        state = LinearAttentionState(given["initial_state"], leaves["normalizer"])
        given["initial_state"] = state
    output, state = function(**given, return_state=True, **options)
    parts = state if isinstance(state, tuple) else (state,)
    found = {str(i): x for i, x in enumerate((output, *parts)) if x is not None}
    generator = torch.Generator().manual_seed(2)
    probes = [torch.rand(x.shape, generator=generator).double() - 0.3 for x in found.values()]
    loss = sum((x.double() * probe).sum() for x, probe in zip(found.values(), probes, strict=True))
    present = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(loss, list(present.values()))
    return found | {f"d_{name}": x for name, x in zip(present, gradients, strict=True)}


def move(inputs, seed):
    """The inputs in float64, each number up or down by the rounding of its dtype."""
    generator = torch.Generator().manual_seed(seed)
    moved = dict(inputs)
    for name, x in inputs.items():
        if x is not None:
            up = torch.randint(2, x.shape, generator=generator) * 2 - 1
            moved[name] = x.double() * (1 + up * torch.finfo(x.dtype).eps / 2)
    return moved


@pytest.mark.long
@cases
@hypothesis.given(st.data())
def test_linear_attention(data):
    draw = Draw(data)
    decay, normalize = draw.one_of(*linear.FORMS)
    inputs = linear.make_inputs(
        draw.batch, draw.length, draw.heads, draw.kv_heads, *draw.widths, decay, draw.dtype,
        draw.seed,
    )  # fmt: skip
    if decay is not None:
        inputs["log_decay"] = inputs["log_decay"].detach() * draw.one_of(*DECAYS)
    state = draw.one_of((None, None), linear.make_state(inputs, normalize, draw.sequences))
    inputs |= {"initial_state": state[0], "normalizer": state[1]}
    draw.check(
        chunk_linear_attention, inputs, eps=1e-3, normalize=normalize, scale=draw.one_of(1.0, 0.1)
    )


@pytest.mark.long
@cases
@hypothesis.given(st.data())
def test_gated_linear_attention(data):
    draw = Draw(data, longest=100)
    inputs = gated.make_inputs(
        draw.batch, draw.length, draw.heads, draw.kv_heads, *draw.widths,
        draw.one_of(*gated.KINDS), draw.dtype, draw.sequences,
    )  # fmt: skip
    inputs["log_decay"] *= draw.one_of(*DECAYS)
    draw.check(chunk_gated_linear_attention, inputs, scale=draw.one_of(1.0, 0.1))


@pytest.mark.long
@cases
@hypothesis.given(st.data())
def test_gated_delta_rule(data):
    draw = Draw(data)
    decay = draw.one_of(None, "head", "token")
    inputs = delta.make_inputs(
        draw.length, decay, draw.dtype, batch=draw.batch, heads=draw.heads,
        kv_heads=draw.kv_heads, widths=draw.widths, seed=draw.seed,
    )  # fmt: skip
    if decay is not None:
        inputs["log_decay"] = inputs["log_decay"].detach() * draw.one_of(*DECAYS)
    inputs["initial_state"] = draw.one_of(None, delta.make_state(inputs, draw.sequences))
    draw.check(chunk_gated_delta_rule, inputs, scale=draw.one_of(1.0, 0.1))


@pytest.mark.long
@cases
@hypothesis.given(st.data())
def test_kda(data):
    draw = Draw(data, longest=100)
    inputs = kda.make_inputs(
        draw.length, draw.dtype, batch=draw.batch, heads=draw.heads, kv_heads=draw.kv_heads,
        widths=draw.widths, seed=draw.seed,
    )  # fmt: skip
    inputs["log_decay"] = inputs["log_decay"].detach() * draw.one_of(*DECAYS)
    inputs["initial_state"] = draw.one_of(None, delta.make_state(inputs, draw.sequences))
    draw.check(chunk_kda, inputs, scale=draw.one_of(1.0, 0.1))


@pytest.mark.long
@cases
@hypothesis.given(st.data())
def test_causal_conv(data):
    draw = Draw(data)
    values = convolution.make_inputs(
        draw.batch, draw.length, draw.between(1, 90), draw.between(1, 9), draw.one_of(True, False),
        draw.dtype, draw.sequences, draw.seed,
    )  # fmt: skip
    inputs = dict(zip(("input", "weight", "bias", "initial_state"), values, strict=True))
    draw.check(causal_conv, inputs, activation=draw.one_of(None, "silu"))


@pytest.mark.long
@cases
@hypothesis.given(st.data())
def test_long_conv(data):
    draw = Draw(data, longest=100)
    widths = draw.one_of((None, 1), (None, 3), (1, 1), (1, 5), (4, 4), (3, 2), (5, 9))
    inputs = long.make_all(
        draw.batch, draw.length, draw.heads, widths, draw.between(1, 12), draw.dtype,
        draw.sequences, skip=draw.one_of(True, False), state=draw.one_of(True, False),
        seed=draw.seed,
    )  # fmt: skip
    inputs["log_decay"] *= draw.one_of(*DECAYS)
    draw.check(chunk_ssm_conv, inputs)


@pytest.mark.long
@cases
@hypothesis.given(st.data())
def test_nonlinear_gated(data):
    draw = Draw(data, longest=20)
    widths = draw.between(1, 20), draw.between(1, 20)
    inputs = nonlinear.make_inputs(
        draw.batch, draw.length, draw.kv_heads, *widths, draw.one_of(0.0, 0.9, 2.4), draw.dtype,
        draw.sequences, draw.seed,
    )  # fmt: skip
    inputs["log_decay"] *= draw.one_of(*DECAYS)
    chunk_size, sweeps = draw.one_of(None, 4, 8), draw.one_of(1, 4)
    draw.check(
        chunk_nonlinear_gated, inputs, scale=draw.one_of(1.0, 0.1), chunk_size=chunk_size,
        sweeps=sweeps,
    )  # fmt: skip
