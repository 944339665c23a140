"""Linear attention's Triton kernels in the interpreter, against the float64 recurrence.

Products of bf16 are wrong in the interpreter, so bf16 runs with float32 products of operands that
are rounded to bf16 where the compiled kernels round them; that these use tensor cores on bf16 is
read off the machine code, in test_compiled_table.py.
"""

from itertools import product

import pytest
import torch

from supra.kernels import launch
from supra.kernels.linear_attention import (
    LinearAttentionState,
    chunk_linear_attention,
    recurrent_linear_attention,
)
from supra.kernels.linear_attention import triton as triton_backend
from supra.kernels.linear_attention.api import OPERATOR
from supra.kernels.linear_attention.inputs import Inputs

DECAYS = (None, ("head", "query"), ("head", "key"), ("token", "query"), ("token", "key"))
FORMS = tuple(product(DECAYS, (None, "sum")))
LENGTHS = (1, 15, 63, 64, 65, 127, 129, 300)
# largest relative RMS errors seen over everything below: 2e-6, 6e-4, 9e-3
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def make_inputs(batch, length, heads, kv_heads, key_width, value_width, decay, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "query": uniform(batch, length, heads, key_width) + 0.1,
        "key": uniform(batch, length, kv_heads, key_width) + 0.1,
        "value": uniform(batch, length, kv_heads, value_width) * 2 - 1,
    }
    inputs = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    if decay is not None:
        form, group = decay
        state_heads = heads if group == "query" else kv_heads
        shape = (state_heads,) if form == "head" else (batch, length, state_heads)
        inputs["log_decay"] = (-0.3 * uniform(*shape)).float().requires_grad_()
    return inputs


def make_state(inputs, normalize, sequences, seed=1):
    generator = torch.Generator().manual_seed(seed)
    key, value = inputs["key"], inputs["value"]
    heads = inputs["log_decay"].shape[-1] if "log_decay" in inputs else key.shape[2]
    shape = (sequences, heads, key.shape[3], value.shape[3])
    memory = torch.rand(shape, generator=generator) - 0.5
    normalizer = torch.rand(shape[:3], generator=generator).requires_grad_()
    return LinearAttentionState(memory.requires_grad_(), normalizer if normalize else None)


def results(inputs, state, **options):
    """Output, final state and every gradient, by name."""
    output, end = chunk_linear_attention(
        **inputs, initial_state=state, return_state=True, **options
    )
    found = {"output": output, "memory": end.memory, "normalizer": end.normalizer}
    leaves = dict(inputs)
    if state is not None:
        leaves |= {"memory": state.memory, "normalizer": state.normalizer}
    found, leaves = ({n: x for n, x in d.items() if x is not None} for d in (found, leaves))
    generator = torch.Generator().manual_seed(2)
    probes = [torch.rand(x.shape, generator=generator).double() - 0.3 for x in found.values()]
    loss = sum((x.double() * probe).sum() for x, probe in zip(found.values(), probes, strict=True))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return found | {f"d_{n}": x for n, x in zip(leaves, gradients, strict=True)}


def assert_matches(inputs, state, tolerance, **options):
    expected = results(inputs, state, backend="reference", **options)
    found = results(inputs, state, backend="triton", **options)
    for name, truth in expected.items():
        assert (found[name].shape, found[name].dtype) == (truth.shape, truth.dtype), name
        error = (found[name].double() - truth.double()).norm()
        # a gradient that vanishes (of the query of a single token) has no size to be relative to
        size = truth.double().norm().clamp(min=1e-2 * truth.numel() ** 0.5)
        assert error <= tolerance * size, f"{name}: relative error {error / size:.1e}"


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """What is allocated and not written shows as NaN."""

    def poisoned(self, *shape, **options):
        empty = torch.empty(*shape, dtype=options.get("dtype", self.dtype))
        return empty.fill_(torch.nan) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))


@pytest.mark.parametrize(("length", "form"), zip(LENGTHS, FORMS, strict=False))
def test_lengths(length, form):
    decay, normalize = form
    inputs = make_inputs(1, length, 2, 1, 20, 33, decay, torch.float32, seed=length)
    state = make_state(inputs, normalize, 1)
    assert_matches(inputs, state, TOLERANCES[torch.float32], normalize=normalize, scale=0.7)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("decay", "normalize"), FORMS)
def test_forms(decay, normalize, dtype):
    inputs = make_inputs(1, 65, 4, 2, 17, 40, decay, dtype)
    state = make_state(inputs, normalize, 1)
    assert_matches(inputs, state, TOLERANCES[dtype], normalize=normalize, scale=0.7)


@pytest.mark.parametrize(("key_width", "value_width"), [(8, 100), (128, 16), (96, 72), (16, 256)])
def test_widths(key_width, value_width):
    inputs = make_inputs(1, 70, 1, 1, key_width, value_width, ("token", "key"), torch.float32)
    assert_matches(inputs, None, TOLERANCES[torch.float32], normalize="sum")


@pytest.mark.parametrize(("decay", "normalize"), FORMS)
def test_packed_rows(decay, normalize):
    bounds = torch.tensor([0, 0, 1, 20, 20, 150, 151, 160, 160], dtype=torch.int32)
    inputs = make_inputs(1, 160, 2, 1, 16, 20, decay, torch.float32)
    state = make_state(inputs, normalize, len(bounds) - 1)
    tolerance = TOLERANCES[torch.float32]
    assert_matches(inputs, state, tolerance, normalize=normalize, cu_seqlens=bounds)


@pytest.mark.parametrize("log_decay", [0.0, -0.1, -3.0, -1e4, -torch.inf])
@pytest.mark.parametrize("normalize", [None, "sum"])
def test_decays(log_decay, normalize):
    for form in ("head", "token"):
        inputs = make_inputs(1, 130, 2, 2, 16, 16, (form, "key"), torch.float32)
        state = make_state(inputs, normalize, 1)
        with torch.no_grad():  # some heads; some tokens
            inputs["log_decay"].view(-1)[::2] = log_decay
        assert_matches(inputs, state, TOLERANCES[torch.float32], normalize=normalize)


@pytest.mark.parametrize("normalize", [None, "sum"])
def test_resets(normalize):
    inputs = make_inputs(1, 300, 2, 2, 16, 16, ("token", "key"), torch.float32)
    state = make_state(inputs, normalize, 1)
    with torch.no_grad():
        inputs["log_decay"][:, [0, 5, 6, 20, 33, 63, 64, 127, 128, 200, 201, 202, 210]] = -1e4
    assert_matches(inputs, state, TOLERANCES[torch.float32], normalize=normalize)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("factor", [30, 1e-3])
def test_scaled_inputs(factor, dtype):
    # 30: products of fp16 numbers exceed fp16's largest, 65,504
    for normalize in (None, "sum"):
        inputs = make_inputs(1, 130, 2, 1, 64, 16, ("token", "query"), torch.float64)
        inputs = {
            name: x if name == "log_decay" else (x.detach() * factor).to(dtype).requires_grad_()
            for name, x in inputs.items()
        }
        if normalize is None:  # the output itself must fit
            inputs["query"] = (inputs["query"].detach() / factor**2).requires_grad_()
        assert_matches(inputs, None, TOLERANCES[dtype], normalize=normalize, eps=1e-6 * factor**2)


def test_strided_inputs():
    inputs = make_inputs(2, 65, 4, 2, 16, 16, ("token", "query"), torch.float32)
    strided = {}
    for name, x in inputs.items():
        spread = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
        wide = torch.cat((spread, spread), -1)[..., : x.shape[-1]]
        strided[name] = (wide if name == "value" else spread).requires_grad_()
    assert not any(x.is_contiguous() for x in strided.values())
    assert_matches(strided, None, TOLERANCES[torch.float32], normalize="sum")


def test_gradients_of_what_is_not_asked_for():
    inputs = make_inputs(1, 20, 2, 1, 16, 16, ("token", "query"), torch.float32)
    state = make_state(inputs, "sum", 1)
    for only in ("memory", "normalizer", "output"):
        gradients = []
        for backend in ("triton", "reference"):
            output, end = chunk_linear_attention(
                **inputs, initial_state=state, normalize="sum", return_state=True, backend=backend
            )
            loss = {"output": output, **end._asdict()}[only].sum()
            gradients += torch.autograd.grad(loss, inputs["key"])
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "dtype"),  # the others differ in warps and stages alone, which cannot be seen here
    [("sm_80", torch.float32), ("sm_90", torch.float32), ("sm_100", torch.bfloat16)],
)
def test_every_tiling_computes_the_same(target, dtype):
    inputs = make_inputs(1, 70, 2, 1, 130, 70, ("token", "query"), dtype)
    with launch.target(target):
        assert_matches(inputs, None, TOLERANCES[dtype], normalize="sum")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("decay", "normalize"), FORMS)
def test_recurrent_form(decay, normalize, dtype):
    inputs = make_inputs(2, 3, 4, 2, 17, 40, decay, dtype)
    inputs = {name: x.detach() for name, x in inputs.items()}
    options = {"normalize": normalize, "scale": 0.7, "return_state": True}
    start = make_state(inputs, normalize, 2)
    start = LinearAttentionState(*(x if x is None else x.detach() for x in start))
    for state in (None, start):
        expected, end = recurrent_linear_attention(
            **inputs, **options, initial_state=state, backend="reference"
        )
        found, found_end = recurrent_linear_attention(
            **inputs, **options, initial_state=state, backend="triton"
        )
        assert found.dtype == dtype
        assert torch.equal(found, expected) or (found - expected).norm() < 4e-3 * expected.norm()
        assert (found_end.memory - end.memory).norm() < 1e-6 * end.memory.norm()
    own = LinearAttentionState(*(x if x is None else x.clone() for x in start))
    again, same = recurrent_linear_attention(
        **inputs, **options, initial_state=own, backend="triton", in_place=True
    )
    assert torch.equal(again, found)
    assert all(a is b for a, b in zip(same, own, strict=True))
    assert torch.equal(own.memory, found_end.memory)
    assert normalize is None or torch.equal(own.normalizer, found_end.normalizer)


def test_recurrent_form_with_gradients_runs_the_chunked_kernels():
    inputs = make_inputs(1, 3, 2, 1, 16, 16, ("token", "query"), torch.float32)
    step = recurrent_linear_attention(**inputs, normalize="sum", backend="triton")[0]
    whole = chunk_linear_attention(**inputs, normalize="sum", backend="reference")[0]
    found, expected = (torch.autograd.grad(x.sum(), inputs["value"])[0] for x in (step, whole))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_custom_ops_are_sound():
    inputs = make_inputs(1, 5, 2, 1, 20, 12, ("token", "query"), torch.float32)
    inputs = [x.detach() for x in inputs.values()]
    memory, normalizer = torch.ones(2, 2, 20, 12), torch.ones(2, 2, 20)
    options = (True, 0.7, 1e-6, 64, "triton")
    arguments = (*inputs, memory, normalizer, torch.tensor([0, 3, 5]))
    torch.library.opcheck(OPERATOR.forward, (*arguments, *options))
    output, memory, normalizer, weights = OPERATOR.forward(*arguments, *options)
    gradients = (output, memory, normalizer)
    torch.library.opcheck(OPERATOR.backward, (*gradients, *arguments, output, weights, *options))
    step = [x[:, :1] for x in inputs]
    torch.library.opcheck(OPERATOR.step, (*step, memory[:1], normalizer[:1], None, *options))


def test_launches_need_no_host_and_no_device():
    # a packed row on the meta device: reading its bounds would raise
    meta = {"device": "meta", "dtype": torch.bfloat16}
    query, value = torch.empty(1, 300, 4, 64, **meta), torch.empty(1, 300, 2, 64, **meta)
    bounds = torch.empty(5, dtype=torch.int64, device="meta")
    with launch.recording() as launches:
        options = (True, 1.0, 1e-6, 64, "triton")
        inputs = Inputs(query, query[:, :, :2], value, None, None, None, bounds, *options)
        triton_backend.forward(inputs)
    assert [x.kernel.__name__ for x in launches] == ["chunk_states", "chunk_output"]


def test_wide_heads_decode():
    inputs = make_inputs(1, 1, 1, 1, 300, 20, ("token", "key"), torch.float32)
    inputs = {name: x.detach() for name, x in inputs.items()}
    expected, _ = recurrent_linear_attention(**inputs, normalize="sum", backend="reference")
    found, _ = recurrent_linear_attention(**inputs, normalize="sum", backend="triton")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
