"""The nonlinear gated recurrence: every form against the float64 loop, and its contract."""

import math
import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch

from supra.kernels.nonlinear_gated import (
    chunk_nonlinear_gated,
    recurrent_nonlinear_gated,
)
from supra.kernels.nonlinear_gated import torch as torch_backend
from supra.kernels.nonlinear_gated.api import OPERATOR

FORMS = (chunk_nonlinear_gated, recurrent_nonlinear_gated)
BY_TOKEN = ("query", "key", "value", "log_decay")
CONTRACTING, BISTABLE = LARGEST = (0.9, 2.4)  # of |a|


def make_inputs(
    batch, length, heads, width, value_width, largest=CONTRACTING, dtype=torch.float64, seed=0
):
    """query, key, value, log_decay and weight; all with requires_grad.

    Decays lie between exp(-4) and 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "query": uniform(batch, length, heads, width) * 2 - 1,
        "key": uniform(batch, length, heads, width) * 2 - 1,
        "value": uniform(batch, length, heads, value_width) * 2 - 1,
        "log_decay": -4 * uniform(batch, length, heads) ** 4,
        "weight": (uniform(heads, width, value_width) * 2 - 1) * largest,
    }
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def make_state(inputs, sequences=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences or len(inputs["key"]), *inputs["weight"].shape)
    state = torch.rand(shape, generator=generator, dtype=torch.float64) * 3 - 1.5
    return state.to(torch.promote_types(inputs["key"].dtype, torch.float32)).requires_grad_()


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
    """Root mean square of every error, relative to that of what is expected."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)
        assert error <= tolerance, f"result {i}: relative error {error:.1e}"


def part(inputs, begin, stop):
    return {name: x[:, begin:stop] if name in BY_TOKEN else x for name, x in inputs.items()}


@pytest.mark.parametrize("length", [1, 7, 64, 75])
@pytest.mark.parametrize("largest", LARGEST)
def test_all_forms_agree_with_the_reference(length, largest):
    for heads, width, value_width in ((1, 8, 5), (3, 5, 20)):
        inputs = make_inputs(2, length, heads, width, value_width, largest)
        expected, _ = chunk_nonlinear_gated(**inputs, scale=0.7, backend="reference")
        found = [
            chunk_nonlinear_gated(**inputs, scale=0.7)[0],
            chunk_nonlinear_gated(**inputs, scale=0.7, chunk_size=16)[0],
            recurrent_nonlinear_gated(**inputs, scale=0.7)[0],
        ]
        assert_close(found, [expected] * 3, 1e-13)


def test_without_weight_and_with_small_keys_it_is_a_gated_sum():
    inputs = {name: x.detach() for name, x in make_inputs(1, 9, 2, 4, 3).items()}
    inputs |= {"weight": torch.zeros_like(inputs["weight"]), "key": inputs["key"] * 1e-6}
    f = inputs["log_decay"].exp()
    past = torch.ones(9, 9, dtype=torch.bool).tril()[..., None]
    sums = inputs["log_decay"].cumsum(1)
    decay = (sums[:, :, None] - sums[:, None]).masked_fill(~past, -torch.inf).exp()
    scores = torch.einsum("bihk,bjhk->bijh", inputs["query"], inputs["key"]) * decay
    expected = torch.einsum("bijh,bjh,bjhv->bihv", scores, 1 - f, inputs["value"])
    assert_close([chunk_nonlinear_gated(**inputs)[0]], [expected], 1e-11)


def test_two_tokens_by_hand():
    def column(*numbers):
        return torch.tensor(numbers, dtype=torch.float64).view(1, -1, 1, 1)

    first = 0.75 * math.tanh(0.5 * 1.5)
    second = 0.5 * first + 0.5 * math.tanh(-2 * first + 0.25)
    for function in FORMS:
        output, state = function(
            column(2, 3), column(0.5, 1), column(1.5, 0.25), column(0.25, 0.5)[..., 0].log(),
            column(-2)[0], return_state=True,
        )  # fmt: skip
        assert_close([output, state], [column(2 * first, 3 * second), column(second)], 1e-15)


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("function", FORMS)
def test_float32_is_within_rounding_of_the_reference(function, largest):
    inputs = make_inputs(2, 140, 3, 20, 5, largest, torch.float32)
    state = make_state(inputs)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = run_with_gradients(
        function, exact, state.detach().double().requires_grad_(), backend="reference"
    )
    # near the ridge between two resting points a gradient grows with the distance to it
    tolerance = {CONTRACTING: 5e-7, BISTABLE: 1e-5}[largest]
    assert_close(run_with_gradients(function, inputs, state), expected, tolerance)


def test_what_a_slow_gate_writes_is_not_lost():
    # 1 - exp(-1e-5) has no more than 2 digits in float32
    inputs = make_inputs(1, 200, 2, 5, 4, dtype=torch.float32)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -1e-5)
    expected, _ = chunk_nonlinear_gated(**inputs, backend="reference")
    for function in FORMS:
        assert_close([function(**inputs)[0]], [expected], 2e-6)


@pytest.mark.parametrize("largest", LARGEST)
def test_gradients_agree_with_the_reference(largest):
    for heads, chunk_size in ((3, 16), (2, 1), (1, 64)):
        inputs = make_inputs(2, 75, heads, 5, 4, largest)
        state = make_state(inputs)
        expected = run_with_gradients(chunk_nonlinear_gated, inputs, state, backend="reference")
        found = run_with_gradients(chunk_nonlinear_gated, inputs, state, chunk_size=chunk_size)
        assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("function", FORMS)
def test_gradcheck(function):
    inputs = make_inputs(1, 5, 2, 3, 2, BISTABLE)
    state = make_state(inputs)
    options = {"chunk_size": 4} if function is chunk_nonlinear_gated else {}

    def run(*leaves):
        named = dict(zip(inputs, leaves[:-1], strict=True))
        return function(**named, initial_state=leaves[-1], return_state=True, **options)

    assert torch.autograd.gradcheck(run, (*inputs.values(), state), fast_mode=False)


def test_two_segments_with_carried_state_are_one_run():
    inputs = make_inputs(2, 75, 3, 5, 4)
    expected = chunk_nonlinear_gated(**inputs, return_state=True, chunk_size=16)
    for first, second in product(FORMS, repeat=2):
        head, state = first(**part(inputs, 0, 37), return_state=True)
        tail, state = second(**part(inputs, 37, 75), return_state=True, initial_state=state)
        assert_close([torch.cat((head, tail), 1), state], expected, 1e-13)


def test_packed_sequences_are_the_same_as_separate_ones():
    bounds = [0, 0, 1, 20, 20, 53, 54, 90, 90]
    inputs = make_inputs(1, bounds[-1], 3, 5, 4)
    state = make_state(inputs, sequences=len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)

    def separate(initial_state, return_state, **inputs):
        outputs, states = [], []
        for n, (begin, stop) in enumerate(pairwise(bounds)):
            end = initial_state[n : n + 1]
            if begin < stop:
                output, end = chunk_nonlinear_gated(
                    **part(inputs, begin, stop), initial_state=end, return_state=True
                )
                outputs.append(output)
            states.append(end)
        return torch.cat(outputs, 1), torch.cat(states)

    expected = run_with_gradients(separate, inputs, state)
    for options in ({"chunk_size": 16}, {"chunk_size": 1}, {}, {"backend": "reference"}):
        found = run_with_gradients(
            chunk_nonlinear_gated, inputs, state, cu_seqlens=cu_seqlens, **options
        )
        assert_close(found, expected, 1e-13)


def test_packed_sequences_go_through_their_tokens_together(monkeypatch):
    bounds = [0, 7, 7, 12, 25, 28]
    inputs = make_inputs(1, bounds[-1], 2, 5, 4)
    moved = []
    advance = torch_backend._advance

    def count(state, *tensors, **room):
        moved.append(len(state))
        advance(state, *tensors, **room)

    monkeypatch.setattr(torch_backend, "_advance", count)
    output, _ = chunk_nonlinear_gated(**inputs, cu_seqlens=torch.tensor(bounds))
    longest = [4] * 3 + [3] * 2 + [2] * 2 + [1] * 6  # of 13, 7, 5 and 3 tokens
    assert moved == longest
    output.sum().backward()
    assert moved == longest * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_cost_their_own_rounding(dtype):
    # Truth is float64 on the rounded inputs; the budget is what its results lose when they are
    # rounded. Gradients cost up to 1.7 times that, for the output's gradient is rounded too.
    exact = {
        name: x.detach().to(dtype).double().requires_grad_()
        for name, x in make_inputs(2, 70, 3, 20, 5).items()
    }
    rounded = {name: x.detach().to(dtype).requires_grad_() for name, x in exact.items()}
    expected = run_with_gradients(chunk_nonlinear_gated, exact, backend="reference")
    found = run_with_gradients(chunk_nonlinear_gated, rounded)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    for a, b in zip(found, expected, strict=True):
        budget = (b.to(dtype).double() - b).norm()
        assert (a.double() - b).norm() < 1.8 * budget + 1e-6 * b.norm()


def test_autocast_changes_nothing():
    inputs = make_inputs(1, 20, 3, 8, 5, dtype=torch.float32)
    expected = run_with_gradients(chunk_nonlinear_gated, inputs)
    step, _ = recurrent_nonlinear_gated(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_with_gradients(chunk_nonlinear_gated, inputs)
        assert torch.equal(recurrent_nonlinear_gated(**inputs)[0], step)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reset", [-1e4, -torch.inf])
def test_a_reset_forgets_everything_and_keeps_gradients_finite(reset):
    inputs = make_inputs(1, 50, 2, 5, 4)
    with torch.no_grad():
        inputs["log_decay"][:, [0, 5, 6, 20, 33]] = reset
        inputs["weight"].zero_()
    state = make_state(inputs)
    expected = run_with_gradients(chunk_nonlinear_gated, inputs, state, backend="reference")
    for function in FORMS:
        found = run_with_gradients(function, inputs, state)
        assert all(x.isfinite().all() for x in found)
        assert_close(found, expected, 1e-13)


def test_a_token_that_does_not_decay_moves_nothing():
    inputs = make_inputs(2, 9, 2, 5, 4)
    state = make_state(inputs)
    inputs["log_decay"] = torch.zeros_like(inputs["log_decay"])
    for function in FORMS:
        _, end = function(**inputs, initial_state=state, return_state=True)
        assert torch.equal(end, state)


def test_no_gradient_flows_from_the_past_to_the_future():
    inputs = make_inputs(1, 40, 3, 5, 4)
    output, _ = chunk_nonlinear_gated(**inputs, chunk_size=16)
    for t in (0, 15, 16, 38):
        gradients = torch.autograd.grad(
            output[:, t].square().sum(), [inputs[name] for name in BY_TOKEN], retain_graph=True
        )
        for name, gradient in zip(BY_TOKEN, gradients, strict=True):
            assert torch.all(gradient[:, t + 1 :] == 0), (name, t)
            assert torch.any(gradient[:, : t + 1] != 0), (name, t)


@pytest.mark.parametrize("function", FORMS)
def test_inputs_need_not_be_contiguous(function):
    inputs = make_inputs(2, 20, 3, 5, 4)
    expected = run_with_gradients(function, inputs)
    strided = {
        name: x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        for name, x in inputs.items()
    }
    assert not any(x.is_contiguous() for x in strided.values())
    assert_close(run_with_gradients(function, strided), expected, 1e-13)


@pytest.mark.parametrize("function", FORMS)
def test_meta_device_gives_shapes(function):
    inputs = make_inputs(2, 70, 3, 5, 4, dtype=torch.bfloat16)
    inputs = {name: x.to("meta") for name, x in inputs.items()}
    output, state = function(**inputs, return_state=True)
    assert (output.shape, output.dtype) == ((2, 70, 3, 4), torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 3, 5, 4), torch.float32)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_the_operators_keep_torchs_rules(packed, keep):
    inputs = make_inputs(1, 9, 2, 4, 3, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 4, 9]) if packed else None
    state = make_state(inputs, sequences=2 if packed else 1).mT.contiguous().mT
    tensors = (*inputs.values(), state, cu_seqlens)
    if not keep:
        tensors = [x if x is None else x.detach() for x in tensors]
    options = (0.7, 4, 1e-6, 4)
    torch.library.opcheck(OPERATOR.forward, (*tensors, *options, keep, "torch"))
    if keep:
        tensors = [x if x is None else x.detach() for x in tensors]
        output, end, states, _ = OPERATOR.forward(*tensors, *options, True, "torch")
        arguments = (output, end, *tensors, states, *options, True, "torch")
        torch.library.opcheck(OPERATOR.backward, arguments)


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_given_state_is_not_changed(function, backend):
    inputs = make_inputs(1, 1, 3, 5, 4)
    state = make_state(inputs)
    before = state.detach().clone()
    _, end = function(**inputs, initial_state=state, return_state=True, backend=backend)
    assert torch.equal(state, before)
    assert not torch.equal(end, state)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_in_place_writes_the_given_state(backend):
    inputs = make_inputs(2, 3, 3, 5, 4, dtype=torch.float32)
    inputs = {name: x.detach() for name, x in inputs.items()}
    state = make_state(inputs).detach()
    options = {"initial_state": state, "return_state": True, "backend": backend}
    expected = recurrent_nonlinear_gated(**inputs, **options)
    output, end = recurrent_nonlinear_gated(**inputs, **options, in_place=True)
    assert end.data_ptr() == state.data_ptr()
    assert torch.equal(output, expected[0])
    assert torch.equal(state, expected[1])


def test_state_and_convergence_are_returned_only_on_request():
    inputs = make_inputs(2, 3, 3, 5, 4)
    assert chunk_nonlinear_gated(**inputs)[1] is None
    assert recurrent_nonlinear_gated(**inputs)[1] is None
    for backend in ("torch", "reference"):
        _, state, found = chunk_nonlinear_gated(**inputs, return_convergence=True, backend=backend)
        assert state is None
        assert (found.residual.shape, found.sweeps.dtype) == ((2, 3), torch.int32)
        assert not found.residual.any() and not found.sweeps.any()


def test_states_are_saved_for_the_backward_pass_alone():
    inputs = make_inputs(1, 130, 2, 8, 8, dtype=torch.float32)
    saved = []

    def keep(x):
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        chunk_nonlinear_gated(**inputs)
    assert sum(saved) == sum(x.numel() for x in inputs.values()) + 3 * 2 * 8 * 8
    detached = [x.detach() for x in inputs.values()]
    kept = OPERATOR.forward(*detached, None, None, 1.0, 4, 1e-6, 64, False, "torch")[2]
    assert kept.numel() == 0


def test_one_step_compiles_without_a_graph_break():
    inputs = make_inputs(2, 1, 3, 5, 4, dtype=torch.float32)
    step = torch.compile(recurrent_nonlinear_gated, backend="eager", fullgraph=True)
    options = {"initial_state": make_state(inputs), "return_state": True}
    expected = recurrent_nonlinear_gated(**inputs, **options)
    assert_close(step(**inputs, **options), expected, 1e-6)


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from supra.kernels.nonlinear_gated import chunk_nonlinear_gated as f;"
        "x = torch.ones(1, 3, 1, 2); y = f(x, x, x, 0 * x[..., 0] - 1, torch.zeros(1, 2, 2))[0];"
        "assert y.shape == x.shape and y[0, 0, 0, 0] > 0.9"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
