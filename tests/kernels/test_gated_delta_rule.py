"""The gated delta rule: every form against the float64 recurrence, and what the contract says."""

import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from supra.kernels.gated_delta_rule import (
    chunk_gated_delta_rule,
    recurrent_gated_delta_rule,
)
from supra.kernels.gated_delta_rule.api import OPERATOR

DECAYS = (None, "head", "token")
FORMS = (chunk_gated_delta_rule, recurrent_gated_delta_rule)


def make_inputs(
    batch, length, heads, kv_heads, width, value_width, decay, dtype=torch.float64, seed=0
):
    """query, key of length 1, value, beta in [0, 2), log_decay; all with requires_grad."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "query": uniform(batch, length, heads, width) - 0.5,
        "key": F.normalize(uniform(batch, length, kv_heads, width) - 0.3, dim=-1),
        "value": uniform(batch, length, kv_heads, value_width) * 2 - 1,
        "beta": 2 * uniform(batch, length, kv_heads),
    }
    inputs["beta"][:, length // 2] = 0
    if decay is not None:
        shape = (kv_heads,) if decay == "head" else (batch, length, kv_heads)
        inputs["log_decay"] = -0.3 * uniform(*shape)
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def make_state(inputs, sequences=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    key, value = inputs["key"], inputs["value"]
    shape = (sequences or key.shape[0], key.shape[2], key.shape[3], value.shape[3])
    state = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return state.to(torch.promote_types(key.dtype, torch.float32)).requires_grad_()


def run_with_gradients(function, inputs, state=None, **options):
    """Output, final state and the gradients of a fixed mixture of them wrt all inputs."""
    results = function(**inputs, initial_state=state, return_state=True, **options)
    loss = sum((x.double() * probe_like(x)).sum() for x in results)
    leaves = [*inputs.values(), *([] if state is None else [state])]
    return [*results, *torch.autograd.grad(loss, leaves)]


def probe_like(x):
    generator = torch.Generator().manual_seed(x.numel())
    return torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.3


def assert_close(found, expected, tolerance):
    """Error of every result relative to its size, both as root mean squares."""
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)
        assert error <= tolerance, f"result {i}: relative error {error:.1e}"


def part(inputs, begin, stop):
    return {name: x if x.dim() == 1 else x[:, begin:stop] for name, x in inputs.items()}


@pytest.mark.parametrize("length", [1, 7, 64, 65, 130])
@pytest.mark.parametrize("decay", DECAYS)
def test_all_forms_agree_with_the_reference(length, decay):
    for heads, kv_heads, width, value_width in ((1, 1, 8, 5), (3, 1, 5, 20), (6, 2, 20, 4)):
        inputs = make_inputs(2, length, heads, kv_heads, width, value_width, decay)
        expected, _ = chunk_gated_delta_rule(**inputs, scale=0.7, backend="reference")
        found = [
            chunk_gated_delta_rule(**inputs, scale=0.7)[0],
            chunk_gated_delta_rule(**inputs, scale=0.7, chunk_size=20)[0],
            recurrent_gated_delta_rule(**inputs, scale=0.7)[0],
        ]
        assert_close(found, [expected] * 3, 1e-12)


def test_what_is_written_with_beta_1_is_read_back():
    generator = torch.Generator().manual_seed(0)
    key = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0][:4]
    key = torch.cat((key, key.flip(0)))[None, :, None]  # every key is written twice
    value = torch.randn(1, 8, 1, 5, generator=generator, dtype=torch.float64)
    beta = torch.ones(1, 8, 1, dtype=torch.float64)
    for function in FORMS:
        output, state = function(key, key, value, beta, return_state=True)
        torch.testing.assert_close(output, value)
        torch.testing.assert_close(key[0, 4:, 0] @ state[0, 0], value[0, 4:, 0])


@pytest.mark.parametrize("length", [63, 130])
def test_numbers_are_those_of_transformers(length):
    inputs = make_inputs(2, length, 2, 2, 20, 12, "token", torch.float32)
    state = make_state(inputs)

    def peer(*, query, key, value, beta, log_decay, initial_state, return_state):
        return torch_chunk_gated_delta_rule(
            query, key, value, log_decay, beta,
            initial_state=initial_state, output_final_state=return_state,
        )  # fmt: skip

    expected = run_with_gradients(peer, inputs, state)
    found = run_with_gradients(chunk_gated_delta_rule, inputs, state, scale=20**-0.5)
    assert_close(found, expected, 5e-6)


@pytest.mark.parametrize("decay", DECAYS)
def test_float32_is_within_rounding_of_the_reference(decay):
    for length, heads, kv_heads in ((7, 3, 1), (90, 6, 2)):
        inputs = make_inputs(2, length, heads, kv_heads, 20, 5, decay, torch.float32)
        state = make_state(inputs)
        expected = run_with_gradients(
            chunk_gated_delta_rule, inputs, state, scale=0.7, backend="reference"
        )
        for function in FORMS:
            assert_close(run_with_gradients(function, inputs, state, scale=0.7), expected, 3e-6)


@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_agree_with_the_reference(decay):
    inputs = make_inputs(2, 45, 6, 2, 5, 4, decay)
    state = make_state(inputs)
    expected = run_with_gradients(
        chunk_gated_delta_rule, inputs, state, scale=0.7, backend="reference"
    )
    for function, options in ((FORMS[0], {"chunk_size": 16}), (FORMS[0], {}), (FORMS[1], {})):
        found = run_with_gradients(function, inputs, state, scale=0.7, **options)
        assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("function", FORMS)
def test_gradcheck(function, decay):
    inputs = make_inputs(1, 5, 2, 1, 3, 2, decay)
    options = {"chunk_size": 2} if function is chunk_gated_delta_rule else {}

    def run(*leaves):
        named = dict(zip((*inputs, "initial_state"), leaves, strict=True))
        return function(**named, return_state=True, **options)

    assert torch.autograd.gradcheck(run, (*inputs.values(), make_state(inputs)), fast_mode=False)


@pytest.mark.parametrize("decay", DECAYS)
def test_two_segments_with_carried_state_are_one_run(decay):
    inputs = make_inputs(2, 75, 3, 1, 5, 4, decay)
    expected = chunk_gated_delta_rule(**inputs, return_state=True, chunk_size=16)
    for first, second in product(FORMS, repeat=2):
        head, state = first(**part(inputs, 0, 37), return_state=True)
        tail, state = second(**part(inputs, 37, 75), return_state=True, initial_state=state)
        assert_close([torch.cat((head, tail), 1), state], expected, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_sequences_are_the_same_as_separate_ones(decay):
    bounds = [0, 0, 1, 20, 20, 53, 54, 90]
    inputs = make_inputs(1, bounds[-1], 6, 2, 5, 4, decay)
    state = make_state(inputs, sequences=len(bounds) - 1)

    def separate(*, initial_state, return_state, **inputs):
        outputs, states = [], []
        for n, (begin, stop) in enumerate(pairwise(bounds)):
            start = initial_state[n : n + 1]
            if begin < stop:
                output, start = chunk_gated_delta_rule(
                    **part(inputs, begin, stop), initial_state=start, return_state=return_state
                )
                outputs.append(output)
            states.append(start)
        return torch.cat(outputs, 1), torch.cat(states)

    expected = run_with_gradients(separate, inputs, state)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    for options in ({"chunk_size": 16}, {"chunk_size": 1}, {}, {"backend": "reference"}):
        found = run_with_gradients(
            chunk_gated_delta_rule, inputs, state, cu_seqlens=cu_seqlens, **options
        )
        assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16_costs_no_more_than_its_own_rounding(decay):
    # truth is float64 on the rounded inputs; results in bfloat16 lose 1.6e-3 when they are rounded,
    # the gradients as much again with the gradient of the output
    inputs = make_inputs(2, 70, 3, 1, 20, 5, decay)
    exact = {name: x.detach().bfloat16().double().requires_grad_() for name, x in inputs.items()}
    rounded = {name: x.detach().bfloat16().requires_grad_() for name, x in exact.items()}
    expected = run_with_gradients(chunk_gated_delta_rule, exact)
    found = run_with_gradients(chunk_gated_delta_rule, rounded)
    assert (found[0].dtype, found[1].dtype) == (torch.bfloat16, torch.float32)
    assert_close(found[1:2], expected[1:2], 1e-6)
    assert_close(found, expected, 4e-3)


def test_autocast_changes_nothing():
    inputs = make_inputs(1, 20, 3, 1, 8, 5, "token", torch.float32)
    expected = run_with_gradients(chunk_gated_delta_rule, inputs)
    step, _ = recurrent_gated_delta_rule(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_with_gradients(chunk_gated_delta_rule, inputs)
        assert torch.equal(recurrent_gated_delta_rule(**inputs)[0], step)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reset", [-1e4, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reset_forgets_everything_and_keeps_gradients_finite(reset, dtype):
    inputs = make_inputs(1, 50, 2, 2, 5, 4, "token", dtype)
    with torch.no_grad():
        inputs["log_decay"][:, [0, 5, 6, 20, 33]] = reset
    state = make_state(inputs)
    expected = run_with_gradients(chunk_gated_delta_rule, inputs, state, backend="reference")
    for function, options in ((FORMS[0], {"chunk_size": 16}), (FORMS[0], {}), (FORMS[1], {})):
        found = run_with_gradients(function, inputs, state, **options)
        assert_close(found, expected, 1e-12 if dtype == torch.float64 else 3e-6)
        assert found[-1].abs().max() < 1e-40


@pytest.mark.parametrize("reset", [-1e4, -torch.inf])
@pytest.mark.parametrize("function", FORMS)
def test_a_head_that_forgets_at_once_sees_its_own_token_only(function, reset):
    inputs = make_inputs(1, 20, 2, 2, 5, 4, "head", torch.float32)
    with torch.no_grad():
        inputs["log_decay"][0] = reset
    found = run_with_gradients(function, inputs)
    assert all(x.isfinite().all() for x in found)
    own = (inputs["query"] * inputs["key"]).sum(-1) * inputs["beta"]
    own = own[..., None] * inputs["value"]
    torch.testing.assert_close(found[0][:, :, 0], own[:, :, 0])


def test_no_gradient_flows_from_the_past_to_the_future():
    inputs = make_inputs(1, 40, 3, 1, 5, 4, "token")
    output, _ = chunk_gated_delta_rule(**inputs, chunk_size=16)
    for t in (0, 15, 16, 38):
        gradients = torch.autograd.grad(
            output[:, t].square().sum(), inputs.values(), retain_graph=True
        )
        for name, gradient in zip(inputs, gradients, strict=True):
            assert torch.all(gradient[:, t + 1 :] == 0), (name, t)
            if name != "log_decay":  # token 0 has no past that its decay could change
                assert torch.any(gradient[:, : t + 1] != 0), (name, t)


@pytest.mark.parametrize("function", FORMS)
def test_inputs_need_not_be_contiguous(function):
    inputs = make_inputs(2, 20, 6, 2, 5, 4, "token")
    expected = run_with_gradients(function, inputs)
    strided = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for name, x in inputs.items()
    }
    assert not any(x.is_contiguous() for x in strided.values())
    assert_close(run_with_gradients(function, strided), expected, 1e-14)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("function", FORMS)
def test_meta_device_gives_shapes(function, decay):
    inputs = make_inputs(2, 70, 6, 2, 5, 4, decay, torch.bfloat16)
    inputs = {name: x.to("meta") for name, x in inputs.items()}
    output, state = function(**inputs, return_state=True)
    assert (output.shape, output.dtype) == ((2, 70, 6, 4), torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 2, 5, 4), torch.float32)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_custom_ops_keep_what_torch_asks_of_them(decay):
    inputs = make_inputs(1, 9, 4, 2, 5, 4, decay, torch.float32)
    arguments = (*inputs.values(), *[None] * (decay is None), make_state(inputs))
    cu_seqlens = torch.tensor([0, 9])
    torch.library.opcheck(OPERATOR.forward, (*arguments, cu_seqlens, 0.7, 4, "torch"))
    d_output, d_state = torch.ones(1, 9, 4, 4), torch.ones(1, 2, 5, 4)
    detached = [x if x is None else x.detach() for x in (*arguments, cu_seqlens)]
    torch.library.opcheck(OPERATOR.backward, (d_output, d_state, *detached, 0.7, 4, "torch"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_given_state_changes_in_place_only(backend):
    inputs = make_inputs(2, 3, 3, 1, 5, 4, "head", torch.float32)
    given = make_state(inputs).detach()
    options = {"return_state": True, "backend": backend}
    for function in FORMS:
        state = given.clone()
        output, end = function(**inputs, initial_state=state, **options)
        assert torch.equal(state, given)
        assert not torch.equal(end, given)
    with torch.no_grad():
        found, same = recurrent_gated_delta_rule(
            **inputs, initial_state=state, in_place=True, **options
        )
    assert same is state
    assert torch.equal(found, output)
    assert torch.equal(state, end)


def test_state_is_returned_only_on_request():
    inputs = make_inputs(1, 3, 1, 1, 5, 4, None)
    assert all(function(**inputs)[1] is None for function in FORMS)


def test_backward_saves_inputs_only():
    inputs = make_inputs(1, 512, 2, 2, 8, 8, "head", torch.float32)
    saved = []

    def keep(x):
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        chunk_gated_delta_rule(**inputs)
    assert sum(saved) == sum(x.numel() for x in inputs.values())


def test_one_step_compiles_without_a_graph_break():
    inputs = make_inputs(2, 1, 6, 2, 5, 4, "token", torch.float32)
    state = make_state(inputs)
    step = torch.compile(recurrent_gated_delta_rule, backend="eager", fullgraph=True)
    expected = recurrent_gated_delta_rule(**inputs, initial_state=state, return_state=True)
    found = step(**inputs, initial_state=state, return_state=True)
    assert_close(found, expected, 1e-6)


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from supra.kernels.gated_delta_rule import chunk_gated_delta_rule as f;"
        "x = torch.ones(1, 3, 1, 1); y = f(x, x, x, x[..., 0] / 2)[0];"
        "assert y.flatten().tolist() == [0.5, 0.75, 0.875]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
