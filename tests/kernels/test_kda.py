"""Kimi Delta Attention: every form against the float64 recurrence, and what the contract says."""

import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import (
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)

from supra.kernels.gated_delta_rule import chunk_gated_delta_rule
from supra.kernels.kda import chunk_kda, recurrent_kda
from supra.kernels.kda.api import OPERATOR
from tests.kernels import test_gated_delta_rule as delta
from tests.kernels.test_gated_delta_rule import assert_close, make_state, part, run_with_gradients

FORMS = (chunk_kda, recurrent_kda)
SHAPES = ((1, 1, 8, 5), (3, 1, 5, 20), (6, 2, 20, 4))


def make_inputs(batch, length, heads, kv_heads, width, value_width, dtype=torch.float64, seed=0):
    """query, key of length 1, value, beta in [0, 2), log_decay in (-4, 0], most of it weak."""
    sizes = (batch, length, heads, kv_heads, width, value_width)
    inputs = delta.make_inputs(*sizes, None, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    decay = torch.rand(inputs["key"].shape, generator=generator, dtype=torch.float64)
    return inputs | {"log_decay": (-4 * decay**4).to(dtype).requires_grad_()}


@pytest.mark.parametrize("length", [1, 7, 65, 130])
def test_all_forms_agree_with_the_reference(length):
    for shape in SHAPES:
        inputs = make_inputs(2, length, *shape)
        expected, _ = chunk_kda(**inputs, scale=0.7, backend="reference")
        found = [
            chunk_kda(**inputs, scale=0.7)[0],
            chunk_kda(**inputs, scale=0.7, chunk_size=20)[0],
            recurrent_kda(**inputs, scale=0.7)[0],
        ]
        assert_close(found, [expected] * 3, 1e-12)


def test_two_tokens_by_hand():
    # the state decays first: 0.5 * 2 is what the second token finds, and it moves half way to 5
    ones = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    value, beta = torch.tensor([[[[2.0]], [[5.0]]]]).double(), torch.tensor([[[1.0], [0.5]]])
    for function in FORMS:
        output, state = function(
            3 * ones, ones, value, beta, log_decay=(0.5 * ones).log(), return_state=True
        )
        torch.testing.assert_close(output.flatten().tolist(), [3 * 2.0, 3 * 3.0])
        torch.testing.assert_close(state.item(), 3.0)


def test_with_one_decay_for_all_channels_it_is_the_gated_delta_rule():
    inputs = make_inputs(2, 70, 6, 2, 20, 4)
    per_head = inputs["log_decay"][..., 0]
    expected = chunk_gated_delta_rule(**inputs | {"log_decay": per_head}, return_state=True)
    inputs["log_decay"] = per_head[..., None].expand_as(inputs["log_decay"])
    assert_close(chunk_kda(**inputs, return_state=True), expected, 1e-12)


@pytest.mark.parametrize(
    ("peer", "length"), [(chunk_kimi_delta_attention, 70), (recurrent_kimi_delta_attention, 1)]
)
def test_numbers_are_those_of_transformers(peer, length):
    inputs = make_inputs(2, length, 2, 2, 20, 12, torch.float32)
    state = make_state(inputs)

    def theirs(*, query, key, value, beta, log_decay, initial_state, return_state):
        return peer(
            query, key, value, log_decay, beta,
            initial_state=initial_state, output_final_state=return_state,
        )  # fmt: skip

    expected = run_with_gradients(theirs, inputs, state)
    for function in FORMS:
        assert_close(run_with_gradients(function, inputs, state, scale=20**-0.5), expected, 5e-6)


def test_float32_is_within_rounding_of_the_reference():
    for length, heads, kv_heads in ((7, 3, 1), (90, 6, 2)):
        inputs = make_inputs(2, length, heads, kv_heads, 20, 5, torch.float32)
        state = make_state(inputs)
        expected = run_with_gradients(chunk_kda, inputs, state, scale=0.7, backend="reference")
        for function in FORMS:
            assert_close(run_with_gradients(function, inputs, state, scale=0.7), expected, 3e-6)


def test_gradients_agree_with_the_reference():
    for heads, kv_heads, chunk_size in ((6, 2, 16), (3, 3, 20), (2, 1, 1), (1, 1, 64)):
        inputs = make_inputs(2, 45, heads, kv_heads, 5, 4)
        state = make_state(inputs)
        expected = run_with_gradients(chunk_kda, inputs, state, scale=0.7, backend="reference")
        for function, options in ((FORMS[0], {"chunk_size": chunk_size}), (FORMS[1], {})):
            found = run_with_gradients(function, inputs, state, scale=0.7, **options)
            assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("function", FORMS)
def test_gradcheck(function):
    inputs = make_inputs(1, 5, 2, 1, 3, 2)
    options = {"chunk_size": 4} if function is chunk_kda else {}

    def run(*leaves):
        named = dict(zip((*inputs, "initial_state"), leaves, strict=True))
        return function(**named, return_state=True, **options)

    assert torch.autograd.gradcheck(run, (*inputs.values(), make_state(inputs)), fast_mode=False)


def test_two_segments_with_carried_state_are_one_run():
    inputs = make_inputs(2, 75, 3, 1, 5, 4)
    expected = chunk_kda(**inputs, return_state=True, chunk_size=16)
    for first, second in product(FORMS, repeat=2):
        head, state = first(**part(inputs, 0, 37), return_state=True)
        tail, state = second(**part(inputs, 37, 75), return_state=True, initial_state=state)
        assert_close([torch.cat((head, tail), 1), state], expected, 1e-12)


def test_packed_sequences_are_the_same_as_separate_ones():
    bounds = [0, 0, 1, 20, 20, 53, 54, 90]
    inputs = make_inputs(1, bounds[-1], 6, 2, 5, 4)
    state = make_state(inputs, sequences=len(bounds) - 1)

    def separate(*, initial_state, return_state, **inputs):
        outputs, states = [], []
        for n, (begin, stop) in enumerate(pairwise(bounds)):
            start = initial_state[n : n + 1]
            if begin < stop:
                output, start = chunk_kda(
                    **part(inputs, begin, stop), initial_state=start, return_state=return_state
                )
                outputs.append(output)
            states.append(start)
        return torch.cat(outputs, 1), torch.cat(states)

    expected = run_with_gradients(separate, inputs, state)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    for options in ({"chunk_size": 16}, {"chunk_size": 1}, {}, {"backend": "reference"}):
        found = run_with_gradients(chunk_kda, inputs, state, cu_seqlens=cu_seqlens, **options)
        assert_close(found, expected, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_16_bits_cost_no_more_than_their_own_rounding(dtype, tolerance):
    # truth is float64 on the rounded inputs; results in bfloat16 lose 1.6e-3 when they are rounded,
    # the gradients as much again with the gradient of the output
    inputs = make_inputs(2, 70, 3, 1, 20, 5)
    exact = {name: x.detach().to(dtype).double().requires_grad_() for name, x in inputs.items()}
    rounded = {name: x.detach().to(dtype).requires_grad_() for name, x in exact.items()}
    expected = run_with_gradients(chunk_kda, exact)
    found = run_with_gradients(chunk_kda, rounded)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    assert_close(found[1:2], expected[1:2], 1e-6)
    assert_close(found, expected, tolerance)


def test_autocast_changes_nothing():
    inputs = make_inputs(1, 20, 3, 1, 8, 5, torch.float32)
    expected = run_with_gradients(chunk_kda, inputs)
    step, _ = recurrent_kda(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_with_gradients(chunk_kda, inputs)
        assert torch.equal(recurrent_kda(**inputs)[0], step)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reset", [-104.0, -1e4, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reset_forgets_everything_and_keeps_gradients_finite(reset, dtype):
    inputs = make_inputs(1, 50, 2, 2, 5, 4, dtype)
    with torch.no_grad():
        inputs["log_decay"][:, [0, 5, 6, 20, 33]] = reset
        inputs["log_decay"][:, ::7, :, ::2] = reset
    state = make_state(inputs)
    expected = run_with_gradients(chunk_kda, inputs, state, backend="reference")
    for function, options in ((FORMS[0], {"chunk_size": 16}), (FORMS[0], {}), (FORMS[1], {})):
        found = run_with_gradients(function, inputs, state, **options)
        assert_close(found, expected, 1e-12 if dtype == torch.float64 else 3e-6)
        assert found[-1].abs().max() < 1e-40


@pytest.mark.parametrize("strength", [1, 20, 104])
def test_strong_decay_neither_overflows_nor_loses_digits(strength):
    # exp(-G) of these sums would be up to exp(6656)
    inputs = make_inputs(1, 64, 2, 1, 8, 4, torch.float32)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -strength).requires_grad_()
    state = make_state(inputs)
    expected = run_with_gradients(chunk_kda, inputs, state, backend="reference")
    found = run_with_gradients(chunk_kda, inputs, state)
    assert all(x.isfinite().all() for x in found)
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("beta", [1.0, 1.99])
def test_keys_that_are_all_alike(beta):
    inputs = make_inputs(1, 64, 1, 1, 8, 4, torch.float32)
    with torch.no_grad():
        inputs["key"][:] = inputs["key"][:, :1]
        inputs["beta"][:] = beta
    state = make_state(inputs)
    expected = run_with_gradients(chunk_kda, inputs, state, backend="reference")
    assert_close(run_with_gradients(chunk_kda, inputs, state), expected, 2e-5)


def test_no_gradient_flows_from_the_past_to_the_future():
    inputs = make_inputs(1, 40, 3, 1, 5, 4)
    output, _ = chunk_kda(**inputs, chunk_size=16)
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
    inputs = make_inputs(2, 20, 6, 2, 5, 4)
    expected = run_with_gradients(function, inputs)
    strided = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for name, x in inputs.items()
    }
    assert not any(x.is_contiguous() for x in strided.values())
    assert_close(run_with_gradients(function, strided), expected, 1e-14)


@pytest.mark.parametrize("function", FORMS)
def test_meta_device_gives_shapes(function):
    inputs = make_inputs(2, 70, 6, 2, 5, 4, torch.bfloat16)
    inputs = {name: x.to("meta") for name, x in inputs.items()}
    output, state = function(**inputs, return_state=True)
    assert (output.shape, output.dtype) == ((2, 70, 6, 4), torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 2, 5, 4), torch.float32)


def test_the_custom_ops_keep_what_torch_asks_of_them():
    inputs = make_inputs(1, 9, 4, 2, 5, 4, torch.float32)
    arguments = (*inputs.values(), make_state(inputs, 2), torch.tensor([0, 4, 9]))
    torch.library.opcheck(OPERATOR.forward, (*arguments, 0.7, 4, "torch"))
    d_results, detached = (torch.ones(1, 9, 4, 4), None), [x.detach() for x in arguments]
    torch.library.opcheck(OPERATOR.backward, (*d_results, *detached, 0.7, 4, "torch"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_given_state_changes_in_place_only(backend):
    inputs = make_inputs(2, 3, 3, 1, 5, 4, torch.float32)
    given = make_state(inputs).detach()
    options = {"return_state": True, "backend": backend}
    for function in FORMS:
        state = given.clone()
        output, end = function(**inputs, initial_state=state, **options)
        assert torch.equal(state, given)
        assert not torch.equal(end, given)
    with torch.no_grad():
        found, same = recurrent_kda(**inputs, initial_state=state, in_place=True, **options)
    assert same is state
    assert torch.equal(found, output)
    assert torch.equal(state, end)


def test_state_is_returned_only_on_request():
    inputs = make_inputs(1, 3, 1, 1, 5, 4)
    assert all(function(**inputs)[1] is None for function in FORMS)


def test_backward_saves_inputs_only():
    inputs = make_inputs(1, 512, 2, 2, 8, 8, torch.float32)
    saved = []

    def keep(x):
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        chunk_kda(**inputs)
    assert sum(saved) == sum(x.numel() for x in inputs.values())


def test_one_step_compiles_without_a_graph_break():
    inputs = make_inputs(2, 1, 6, 2, 5, 4, torch.float32)
    options = {"initial_state": make_state(inputs), "return_state": True}
    step = torch.compile(recurrent_kda, backend="eager", fullgraph=True)
    assert_close(step(**inputs, **options), recurrent_kda(**inputs, **options), 1e-6)


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from supra.kernels.kda import chunk_kda as f;"
        "x = torch.ones(1, 3, 1, 1); y = f(x, x, x, x[..., 0] / 2, log_decay=0 * x)[0];"
        "assert y.flatten().tolist() == [0.5, 0.75, 0.875]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
