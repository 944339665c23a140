"""Gated linear attention's Triton kernels, interpreted on a CPU, against the float64 recurrence."""

import pytest
import torch

from supra.kernels.gated_linear_attention import (
    chunk_gated_linear_attention,
    recurrent_gated_linear_attention,
)
from supra.kernels.gated_linear_attention.api import OPERATOR

# measured relative errors are at most 2.2e-6, 3.2e-4 (7e-4 on an H100) and 5.0e-3: sums of logs are
# rounded to 2^-18, and operands to 11 and to 8 bits
TOLERANCES = {torch.float32: 2.5e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
KINDS = ("gla", "rwkv6")


def make_inputs(batch, length, heads, kv_heads, width, value_width, kind, dtype, sequences=None):
    """query, key, value, log_decay, bonus and initial_state; rounded to dtype."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "query": uniform(batch, length, heads, width) * 2 - 1,
        "key": uniform(batch, length, kv_heads, width) * 2 - 1,
        "value": uniform(batch, length, kv_heads, value_width) * 2 - 1,
        "log_decay": -4 * uniform(batch, length, kv_heads, width) ** 4,
    }
    if kind == "rwkv6":
        inputs["bonus"] = uniform(heads, width) * 2 - 1
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    shape = (sequences or batch, kv_heads, width, value_width)
    return inputs | {"initial_state": (uniform(*shape) - 0.5).float()}


def run_with_gradients(inputs, backend, dtype, **options):
    """Output, final state and the gradients of a fixed mixture of them wrt all inputs."""
    leaves = {name: x.to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
    results = chunk_gated_linear_attention(
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


# odd widths; one tile and a bit; a chunk that ends in the middle of every level of its tree
@pytest.mark.parametrize(
    ("kind", "dtype", "shape"),
    [
        ("gla", torch.float32, (1, 66, 1, 1, 5, 20)),
        ("rwkv6", torch.float32, (1, 33, 2, 1, 40, 7)),
        ("gla", torch.bfloat16, (2, 21, 2, 1, 16, 12)),
        ("rwkv6", torch.bfloat16, (1, 66, 1, 1, 12, 16)),
        ("gla", torch.float16, (1, 17, 1, 1, 16, 16)),
    ],
)
def test_chunks_agree_with_the_reference(kind, dtype, shape):
    inputs = make_inputs(*shape, kind, dtype)
    expected = run_with_gradients(inputs, "reference", torch.float64)
    found = run_with_gradients(inputs, "triton", None)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    assert_close(found, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_resets_and_strong_decay(kind):
    bounds = [0, 0, 1, 66, 66, 80]
    inputs = make_inputs(1, bounds[-1], 1, 1, 8, 5, kind, torch.float32, len(bounds) - 1)
    inputs["log_decay"][:, [0, 9, 10, 11, 12, 24, 66, 70]] = -1e4
    inputs["log_decay"][:, ::7, :, ::2] = -torch.inf
    inputs["log_decay"][:, 30:60] *= 20
    cu_seqlens = torch.tensor(bounds)
    expected = run_with_gradients(inputs, "reference", torch.float64, cu_seqlens=cu_seqlens)
    found = run_with_gradients(inputs, "triton", None, cu_seqlens=cu_seqlens)
    assert_close(found, expected, TOLERANCES[torch.float32])


def test_the_past_of_the_decay_of_a_slow_channel_is_not_lost():
    # a sum of logs is rounded once a chunk; rounding every log would move the state by 1e-4 here
    inputs = make_inputs(1, 320, 1, 1, 4, 4, "gla", torch.float32)
    inputs["log_decay"][:] = -1.3e-6
    expected, _ = chunk_gated_linear_attention(**inputs, backend="reference")
    found, _ = chunk_gated_linear_attention(**inputs, backend="triton")
    assert_close([found], [expected], TOLERANCES[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_agree_with_the_reference(kind, dtype):
    inputs = make_inputs(2, 5, 4, 2, 20, 12, kind, dtype)
    expected = recurrent_gated_linear_attention(**inputs, return_state=True, backend="reference")
    state = inputs["initial_state"].clone()
    for in_place in (False, True):
        found = recurrent_gated_linear_attention(
            **inputs, return_state=True, backend="triton", in_place=in_place
        )
        assert found[0].dtype == dtype
        assert_close(found, expected, 3e-7)
        assert torch.equal(inputs["initial_state"], found[1] if in_place else state)
        assert (found[1].data_ptr() == inputs["initial_state"].data_ptr()) is in_place


def test_recurrent_form_with_gradients_runs_the_chunked_kernels():
    inputs = make_inputs(1, 3, 2, 1, 16, 16, "rwkv6", torch.float32)
    inputs["value"].requires_grad_()
    step, _ = recurrent_gated_linear_attention(**inputs, backend="triton")
    whole, _ = chunk_gated_linear_attention(**inputs, backend="reference")
    found, expected = (torch.autograd.grad(x.sum(), inputs["value"])[0] for x in (step, whole))
    assert_close([found], [expected], TOLERANCES[torch.float32])


def test_no_state_is_zeros():
    inputs = make_inputs(1, 3, 1, 1, 4, 4, "gla", torch.float32)
    del inputs["initial_state"]
    expected = chunk_gated_linear_attention(**inputs, return_state=True, backend="reference")
    for function in (chunk_gated_linear_attention, recurrent_gated_linear_attention):
        found = function(**inputs, return_state=True, backend="triton")
        assert_close(found, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_need_not_be_contiguous(kind):
    inputs = make_inputs(1, 5, 2, 2, 16, 16, kind, torch.float32)
    strided = {name: x.mT.contiguous().mT for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    for function in (chunk_gated_linear_attention, recurrent_gated_linear_attention):
        expected, _ = function(**inputs, backend="triton")
        found, _ = function(**strided, backend="triton")
        assert torch.equal(found, expected)


def test_custom_ops_are_sound():
    inputs = make_inputs(1, 5, 2, 1, 20, 12, "rwkv6", torch.float32, 2)
    names = ("query", "key", "value", "log_decay", "bonus", "initial_state")
    arguments = (*(inputs[name] for name in names), torch.tensor([0, 3, 5]), 0.7, 64, "triton")
    torch.library.opcheck(OPERATOR.forward, arguments)
    output, end = OPERATOR.forward(*arguments)
    torch.library.opcheck(OPERATOR.backward, (output, end, *arguments))
    step = [inputs[name][:, :1] for name in names[:4]]
    given = (*step, inputs["bonus"], end[:1], None, *arguments[-3:])
    torch.library.opcheck(OPERATOR.step, given)


def test_bounds_are_checked_where_that_waits_for_nothing():
    inputs = make_inputs(1, 8, 1, 1, 4, 4, "gla", torch.float32)
    with pytest.raises(ValueError, match=r"cu_seqlens \(from 2 to 8\) must go from 0"):
        chunk_gated_linear_attention(
            **inputs | {"initial_state": None}, cu_seqlens=torch.tensor([2, 8]), backend="triton"
        )
