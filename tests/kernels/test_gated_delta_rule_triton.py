"""The gated delta rule's Triton kernels in the interpreter, against the float64 recurrence.

Products of bf16 are wrong in the interpreter, so bf16 runs with float32 products of operands that
are rounded to bf16 where the compiled kernels round them.
"""

import pytest
import torch
import torch.nn.functional as F

from supra.kernels import launch
from supra.kernels.gated_delta_rule import (
    chunk_gated_delta_rule,
    recurrent_gated_delta_rule,
)
from supra.kernels.gated_delta_rule.api import OPERATOR

FORMS = (
    *((decay, torch.float32) for decay in (None, "head", "token")),
    ("token", torch.float16),
    ("token", torch.bfloat16),
)
# largest relative RMS errors seen over everything below: 1e-6, 4e-4 (1.2e-3 on an H100), 7e-3
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def make_inputs(
    length, decay, dtype=torch.float32, *, batch=1, heads=1, kv_heads=1, widths=(16, 16), seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "query": uniform(batch, length, heads, widths[0]) - 0.5,
        "key": F.normalize(uniform(batch, length, kv_heads, widths[0]) - 0.3, dim=-1),
        "value": uniform(batch, length, kv_heads, widths[1]) * 2 - 1,
        "beta": 2 * uniform(batch, length, kv_heads),
    }
    inputs["beta"][:, length // 2] = 0
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if decay is not None:
        shape = (kv_heads,) if decay == "head" else (batch, length, kv_heads)
        inputs["log_decay"] = (-0.3 * uniform(*shape)).float()
    return {name: x.requires_grad_() for name, x in inputs.items()}


def make_state(inputs, sequences, seed=1):
    generator = torch.Generator().manual_seed(seed)
    key, value = inputs["key"], inputs["value"]
    shape = (sequences, key.shape[2], key.shape[3], value.shape[3])
    return (torch.rand(shape, generator=generator) - 0.5).requires_grad_()


def results(inputs, state, function=chunk_gated_delta_rule, **options):
    """Output, final state and every gradient, by name."""
    output, end = function(**inputs, initial_state=state, return_state=True, **options)
    leaves = inputs if state is None else inputs | {"initial_state": state}
    generator = torch.Generator().manual_seed(2)
    probes = [torch.rand(x.shape, generator=generator).double() - 0.3 for x in (output, end)]
    loss = sum((x.double() * probe).sum() for x, probe in zip((output, end), probes, strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {"output": output, "end": end, **found}


def assert_matches(inputs, state, tolerance, **options):
    expected = results(inputs, state, backend="reference", **options)
    found = results(inputs, state, backend="triton", **options)
    for name, truth in expected.items():
        assert (found[name].shape, found[name].dtype) == (truth.shape, truth.dtype), name
        error = (found[name].double() - truth.double()).norm()
        print(name, "ERR", (error / truth.double().norm()).item())
        # a gradient that vanishes (of the decay of the first token) has no size to be relative to,
        # and that of a decay per head is a sum over the tokens of terms near 1, which cancel
        least = truth.numel() ** 0.5 * (inputs["query"].shape[1] if truth.dim() == 1 else 1e-2)
        size = truth.double().norm().clamp(min=least)
        assert error <= tolerance * size, f"{name}: relative error {error / size:.1e}"


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """What is allocated and not written shows as NaN."""

    def poisoned(self, *shape, **options):
        empty = torch.empty(*shape, dtype=options.get("dtype", self.dtype))
        return empty.fill_(torch.nan) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))


@pytest.mark.parametrize(("decay", "dtype"), FORMS)
def test_forms(decay, dtype):
    inputs = make_inputs(70, decay, dtype, heads=2, widths=(17, 20))
    assert_matches(inputs, make_state(inputs, 1), TOLERANCES[dtype], scale=0.7)


@pytest.mark.parametrize(("length", "batch"), [(1, 2), (64, 2), (130, 1)])
def test_lengths(length, batch):
    inputs = make_inputs(length, "token", batch=batch, heads=2, kv_heads=2, seed=length)
    assert_matches(inputs, None, TOLERANCES[torch.float32], scale=0.7)


@pytest.mark.parametrize("widths", [(8, 100), (100, 40), (200, 16)])
def test_widths(widths):
    inputs = make_inputs(70, "token", widths=widths)
    with launch.target("small"):
        assert_matches(inputs, make_state(inputs, 1), TOLERANCES[torch.float32])


@pytest.mark.parametrize("decay", ["head", "token"])
def test_packed_rows(decay):
    bounds = torch.tensor([0, 0, 1, 20, 20, 85, 85], dtype=torch.int32)
    inputs = make_inputs(85, decay, widths=(16, 20))
    state = make_state(inputs, len(bounds) - 1)
    assert_matches(inputs, state, TOLERANCES[torch.float32], cu_seqlens=bounds)


@pytest.mark.parametrize("log_decay", [0.0, -3.0, -1e4, -torch.inf])
def test_decays(log_decay):
    inputs = make_inputs(80, "token")
    with torch.no_grad():
        inputs["log_decay"][:, [0, 5, 6, 20, 63, 64, 79]] = log_decay
    assert_matches(inputs, make_state(inputs, 1), TOLERANCES[torch.float32])


@pytest.mark.parametrize("log_decay", [-1e4, -torch.inf])
def test_a_head_that_forgets_at_once(log_decay):
    inputs = make_inputs(70, "head")
    with torch.no_grad():
        inputs["log_decay"][:] = log_decay
    assert_matches(inputs, make_state(inputs, 1), TOLERANCES[torch.float32])


@pytest.mark.parametrize("beta", [1.0, 1.99])
def test_keys_that_are_all_alike(beta):
    inputs = make_inputs(64, None)
    with torch.no_grad():
        inputs["key"][:] = inputs["key"][:, :1]
        inputs["beta"][:] = beta
    assert_matches(inputs, make_state(inputs, 1), 2e-5)


def test_inputs_need_not_be_contiguous():
    inputs = make_inputs(20, "token", heads=2, kv_heads=2, widths=(16, 16))
    expected = results(inputs, None, backend="triton")
    strided = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for name, x in inputs.items()
    }
    found = results(strided, None, backend="triton")
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize(("decay", "dtype"), FORMS)
def test_recurrent_form(decay, dtype):
    inputs = make_inputs(3, decay, dtype, batch=2, heads=2, widths=(20, 33))
    inputs = {name: x.detach() for name, x in inputs.items()}
    for state in (None, make_state(inputs, 2).detach()):
        given = {"initial_state": state, "return_state": True, "scale": 0.7}
        expected, end = chunk_gated_delta_rule(**inputs, **given, backend="reference")
        found, found_end = recurrent_gated_delta_rule(**inputs, **given, backend="triton")
        assert found.dtype == dtype
        error = (found.double() - expected.double()).norm()
        assert error < TOLERANCES[dtype] * expected.double().norm()
        assert (found_end - end).norm() < 1e-6 * end.norm()
    before = state.clone()
    again, same = recurrent_gated_delta_rule(**inputs, **given, backend="triton", in_place=True)
    assert same is state
    assert torch.equal(again, found)
    assert torch.equal(state, found_end)
    assert not torch.equal(state, before)


def test_recurrent_form_with_gradients_runs_the_chunked_kernels():
    inputs = make_inputs(3, "token", heads=2)
    step = recurrent_gated_delta_rule(**inputs, backend="triton")[0]
    whole = chunk_gated_delta_rule(**inputs, backend="reference")[0]
    found, expected = (torch.autograd.grad(x.sum(), inputs["value"])[0] for x in (step, whole))
    torch.testing.assert_close(found, expected)


def test_the_step_keeps_what_torch_asks_of_it():
    inputs = {name: x.detach() for name, x in make_inputs(2, "token").items()}
    state = make_state(inputs, 1).detach()
    torch.library.opcheck(OPERATOR.step, (*inputs.values(), state, None, 0.7, 64, "triton"))


def test_keys_too_wide_are_refused():
    inputs = make_inputs(3, None, widths=(257, 16))
    with pytest.raises(ValueError, match=r"key \(width 257\) must have at most 256 channels"):
        chunk_gated_delta_rule(**inputs, backend="triton")


def test_custom_ops_are_sound():
    inputs = {
        name: x.detach()
        for name, x in make_inputs(5, "token", heads=2, kv_heads=2, widths=(20, 12)).items()
    }
    state = make_state(inputs, 2).detach()
    arguments = (*inputs.values(), state, torch.tensor([0, 3, 5]), 0.7, 64, "triton")
    torch.library.opcheck(OPERATOR.forward, arguments)
    output, end = OPERATOR.forward(*arguments)
    torch.library.opcheck(OPERATOR.backward, (output, end, *arguments))
