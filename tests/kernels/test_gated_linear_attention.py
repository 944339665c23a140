"""Gated linear attention: every form against the float64 recurrence, and what the contract says."""

import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch

from supra.kernels.gated_linear_attention import (
    chunk_gated_linear_attention,
    recurrent_gated_linear_attention,
)
from supra.kernels.gated_linear_attention.api import OPERATOR

KINDS = ("gla", "rwkv6")
FORMS = (chunk_gated_linear_attention, recurrent_gated_linear_attention)
BY_TOKEN = ("query", "key", "value", "log_decay")


def make_inputs(
    batch, length, heads, kv_heads, width, value_width, kind, dtype=torch.float64, seed=0
):
    """query, key, value, log_decay and RWKV-6's bonus; all with requires_grad.

    Decays lie between exp(-4) and 1, with channels that hardly decay and others that soon forget.
    """
    generator = torch.Generator().manual_seed(seed)

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
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def make_state(inputs, sequences=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    key, value = inputs["key"], inputs["value"]
    shape = (sequences or key.shape[0], key.shape[2], key.shape[3], value.shape[3])
    state = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return state.to(torch.promote_types(key.dtype, torch.float32)).requires_grad_()


def quadratic(query, key, value, log_decay, bonus=None, scale=1.0):
    """The masked-attention form, without a state: exp of differences of running sums."""
    group, length = query.shape[2] // key.shape[2], query.shape[1]
    key, value, log_decay = (x.repeat_interleave(group, 2) for x in (key, value, log_decay))
    sums = log_decay.cumsum(1)
    reads = sums if bonus is None else sums - log_decay
    logs = reads[:, :, None] - sums[:, None]
    past = torch.ones(length, length, dtype=torch.bool).tril(-1)[..., None, None]
    weights = logs.masked_fill(~past, -torch.inf).exp()
    own = torch.eye(length, dtype=query.dtype)[..., None, None]
    weights = weights + own * (1 if bonus is None else bonus)
    scores = torch.einsum("bihk,bjhk,bijhk->bijh", query, key, weights)
    return scale * torch.einsum("bijh,bjhv->bihv", scores, value)


def run_with_gradients(function, inputs, state=None, **options):
    """Output, final state and the gradients of a fixed mixture of them wrt all inputs."""
    results = function(**inputs, initial_state=state, return_state=True, **options)
    loss = sum((x.double() * probe_like(x)).sum() for x in results)
    leaves = [*inputs.values(), *([] if state is None else [state])]
    return [*results, *torch.autograd.grad(loss, leaves)]


def probe_like(x):
    generator = torch.Generator().manual_seed(x.numel())
    return torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.3


def relative_errors(found, expected):
    """Root mean square of every error, relative to that of what is expected."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        yield ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-6)).item()


def assert_close(found, expected, tolerance):
    for i, error in enumerate(relative_errors(found, expected)):
        assert error <= tolerance, f"result {i}: relative error {error:.1e}"


def part(inputs, begin, stop):
    return {name: x[:, begin:stop] if name in BY_TOKEN else x for name, x in inputs.items()}


@pytest.mark.parametrize("length", [1, 7, 64, 65, 130])
@pytest.mark.parametrize("kind", KINDS)
def test_all_forms_agree_with_the_reference(length, kind):
    for heads, kv_heads, width, value_width in ((1, 1, 8, 5), (3, 1, 5, 20), (6, 2, 20, 4)):
        inputs = make_inputs(2, length, heads, kv_heads, width, value_width, kind)
        expected, _ = chunk_gated_linear_attention(**inputs, scale=0.7, backend="reference")
        found = [
            chunk_gated_linear_attention(**inputs, scale=0.7)[0],
            chunk_gated_linear_attention(**inputs, scale=0.7, chunk_size=20)[0],
            recurrent_gated_linear_attention(**inputs, scale=0.7)[0],
            quadratic(**inputs, scale=0.7),
        ]
        assert_close(found, [expected] * 4, 1e-13)


def test_rwkv6_by_hand():
    # Two tokens, one channel. The second output reads k1 v1 with none of the second token's decay;
    # the state has lost the first token by exactly that decay.
    def column(*numbers):
        return torch.tensor(numbers, dtype=torch.float64).view(1, -1, 1, 1)

    for function in FORMS:
        output, state = function(
            column(2, 3), column(5, 7), column(11, 13),
            log_decay=column(0.1, 0.5).log(),
            bonus=torch.tensor([[0.25]], dtype=torch.float64),
            return_state=True,
        )  # fmt: skip
        assert output.flatten().tolist() == [2 * 0.25 * 55, 3 * (55 + 0.25 * 91)]
        torch.testing.assert_close(state.item(), 0.5 * 55 + 91)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FORMS)
def test_float32_is_within_rounding_of_the_reference(function, kind):
    for length, heads, kv_heads in ((7, 3, 1), (140, 6, 2)):
        inputs = make_inputs(2, length, heads, kv_heads, 20, 5, kind, torch.float32)
        state = make_state(inputs)
        options = {"scale": 0.7}
        expected = run_with_gradients(function, inputs, state, **options, backend="reference")
        assert_close(run_with_gradients(function, inputs, state, **options), expected, 5e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_the_reference(kind):
    for heads, kv_heads, chunk_size in ((6, 2, 16), (3, 3, 20), (2, 1, 1), (1, 1, 64)):
        inputs = make_inputs(2, 75, heads, kv_heads, 5, 4, kind)
        state = make_state(inputs)
        expected = run_with_gradients(
            chunk_gated_linear_attention, inputs, state, scale=0.7, backend="reference"
        )
        found = run_with_gradients(
            chunk_gated_linear_attention, inputs, state, scale=0.7, chunk_size=chunk_size
        )
        assert_close(found, expected, 1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FORMS)
def test_gradcheck(function, kind):
    inputs = make_inputs(1, 5, 2, 1, 3, 2, kind)
    state = make_state(inputs)
    options = {"chunk_size": 4} if function is chunk_gated_linear_attention else {}

    def run(*leaves):
        named = dict(zip(inputs, leaves[:-1], strict=True))
        return function(**named, initial_state=leaves[-1], return_state=True, **options)

    assert torch.autograd.gradcheck(run, (*inputs.values(), state), fast_mode=False)


@pytest.mark.parametrize("kind", KINDS)
def test_two_segments_with_carried_state_are_one_run(kind):
    inputs = make_inputs(2, 75, 3, 1, 5, 4, kind)
    expected = chunk_gated_linear_attention(**inputs, return_state=True, chunk_size=16)
    for first, second in product(FORMS, repeat=2):
        head, state = first(**part(inputs, 0, 37), return_state=True)
        tail, state = second(**part(inputs, 37, 75), return_state=True, initial_state=state)
        assert_close([torch.cat((head, tail), 1), state], expected, 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_the_same_as_separate_ones(kind):
    bounds = [0, 0, 1, 20, 20, 53, 54, 90]
    inputs = make_inputs(1, bounds[-1], 6, 2, 5, 4, kind)
    state = make_state(inputs, sequences=len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)

    def separate(initial_state, return_state, **inputs):
        outputs, states = [], []
        for n, (begin, stop) in enumerate(pairwise(bounds)):
            end = initial_state[n : n + 1]
            if begin < stop:
                output, end = chunk_gated_linear_attention(
                    **part(inputs, begin, stop), initial_state=end, return_state=True
                )
                outputs.append(output)
            states.append(end)
        return torch.cat(outputs, 1), torch.cat(states)

    expected = run_with_gradients(separate, inputs, state)
    for options in ({"chunk_size": 16}, {"chunk_size": 1}, {}, {"backend": "reference"}):
        found = run_with_gradients(
            chunk_gated_linear_attention, inputs, state, cu_seqlens=cu_seqlens, **options
        )
        assert_close(found, expected, 1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_cost_their_own_rounding(kind, dtype):
    # Truth is float64 on the rounded inputs; the budget is what its results lose when they are
    # rounded. Gradients cost up to 1.5 times that, for the output's gradient is rounded too.
    exact = {
        name: x.detach().to(dtype).double().requires_grad_()
        for name, x in make_inputs(2, 70, 3, 1, 20, 5, kind).items()
    }
    rounded = {name: x.detach().to(dtype).requires_grad_() for name, x in exact.items()}
    expected = run_with_gradients(chunk_gated_linear_attention, exact, backend="reference")
    found = run_with_gradients(chunk_gated_linear_attention, rounded)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    for a, b in zip(found, expected, strict=True):
        budget = (b.to(dtype).double() - b).norm()
        assert (a.double() - b).norm() < 1.6 * budget + 1e-6 * b.norm()


def test_autocast_changes_nothing():
    inputs = make_inputs(1, 20, 3, 1, 8, 5, "rwkv6", torch.float32)
    expected = run_with_gradients(chunk_gated_linear_attention, inputs)
    step, _ = recurrent_gated_linear_attention(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_with_gradients(chunk_gated_linear_attention, inputs)
        assert torch.equal(recurrent_gated_linear_attention(**inputs)[0], step)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reset", [-1e4, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_forgets_everything_and_keeps_gradients_finite(reset, dtype, kind):
    inputs = make_inputs(1, 50, 2, 2, 5, 4, kind, dtype)
    with torch.no_grad():
        inputs["log_decay"][:, [0, 5, 6, 20, 33]] = reset
        inputs["log_decay"][:, ::7, :, ::2] = reset
    state = make_state(inputs)
    expected = run_with_gradients(chunk_gated_linear_attention, inputs, state, backend="reference")
    tolerance = 1e-13 if dtype == torch.float64 else 5e-7
    for function, options in zip(FORMS, ({"chunk_size": 16}, {}), strict=True):
        assert_close(run_with_gradients(function, inputs, state, **options), expected, tolerance)


@pytest.mark.parametrize("strength", [1, 3, 20, 80])
@pytest.mark.parametrize("kind", KINDS)
def test_strong_decay_neither_overflows_nor_loses_digits(kind, strength):
    # exp(-G) of these sums would be up to exp(5120)
    inputs = make_inputs(1, 64, 2, 1, 8, 4, kind, torch.float32)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -strength).requires_grad_()
    state = make_state(inputs)
    expected = run_with_gradients(chunk_gated_linear_attention, inputs, state, backend="reference")
    found = run_with_gradients(chunk_gated_linear_attention, inputs, state)
    assert all(x.isfinite().all() for x in found)
    assert_close(found, expected, 5e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_flows_from_the_past_to_the_future(kind):
    inputs = make_inputs(1, 40, 3, 1, 5, 4, kind)
    output, _ = chunk_gated_linear_attention(**inputs, chunk_size=16)
    for t in (0, 15, 16, 38):
        gradients = torch.autograd.grad(
            output[:, t].square().sum(), [inputs[name] for name in BY_TOKEN], retain_graph=True
        )
        for name, gradient in zip(BY_TOKEN, gradients, strict=True):
            assert torch.all(gradient[:, t + 1 :] == 0), (name, t)
            if name != "log_decay":  # token 0 has no past that its decay could change
                assert torch.any(gradient[:, : t + 1] != 0), (name, t)


@pytest.mark.parametrize("function", FORMS)
def test_inputs_need_not_be_contiguous(function):
    inputs = make_inputs(2, 20, 6, 2, 5, 4, "gla")
    expected = run_with_gradients(function, inputs)
    strided = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for name, x in inputs.items()
    }
    assert not any(x.is_contiguous() for x in strided.values())
    assert_close(run_with_gradients(function, strided), expected, 1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FORMS)
def test_meta_device_gives_shapes(function, kind):
    inputs = make_inputs(2, 70, 6, 2, 5, 4, kind, torch.bfloat16)
    inputs = {name: x.to("meta") for name, x in inputs.items()}
    output, state = function(**inputs, return_state=True)
    assert (output.shape, output.dtype) == ((2, 70, 6, 4), torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 2, 5, 4), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_keep_torchs_rules(kind):
    inputs = make_inputs(1, 9, 2, 1, 4, 3, kind, torch.float32)
    cu_seqlens = torch.tensor([0, 4, 9])
    state = make_state(inputs, sequences=2)
    inputs = (*[inputs.get(name) for name in (*BY_TOKEN, "bonus")], state, cu_seqlens)
    torch.library.opcheck(OPERATOR.forward, (*inputs, 0.7, 4, "torch"))
    d_output = torch.ones(1, 9, 2, 3)
    detached = [x if x is None else x.detach() for x in inputs]
    torch.library.opcheck(OPERATOR.backward, (d_output, None, *detached, 0.7, 4, "torch"))


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_given_state_is_not_changed(function, backend):
    inputs = make_inputs(1, 1, 3, 1, 5, 4, "gla")
    state = make_state(inputs)
    before = state.detach().clone()
    _, end = function(**inputs, initial_state=state, return_state=True, backend=backend)
    assert torch.equal(state, before)
    assert not torch.equal(end, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_in_place_writes_the_given_state(kind, backend):
    inputs = make_inputs(2, 3, 3, 1, 5, 4, kind, torch.float32)
    inputs = {name: x.detach() for name, x in inputs.items()}
    state = make_state(inputs).detach()
    options = {"initial_state": state, "return_state": True, "backend": backend}
    expected = recurrent_gated_linear_attention(**inputs, **options)
    output, end = recurrent_gated_linear_attention(**inputs, **options, in_place=True)
    assert end.data_ptr() == state.data_ptr()
    assert torch.equal(output, expected[0])
    assert torch.equal(state, expected[1])


def test_state_is_returned_only_on_request():
    inputs = make_inputs(1, 3, 1, 1, 5, 4, "gla")
    assert chunk_gated_linear_attention(**inputs)[1] is None
    assert recurrent_gated_linear_attention(**inputs)[1] is None


def test_backward_saves_no_scores_and_no_states():
    inputs = make_inputs(1, 512, 2, 2, 8, 8, "gla", torch.float32)
    saved = []

    def keep(x):
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        chunk_gated_linear_attention(**inputs)
    assert sum(saved) == sum(x.numel() for x in inputs.values())


def test_one_step_compiles_without_a_graph_break():
    inputs = make_inputs(2, 1, 6, 2, 5, 4, "rwkv6", torch.float32)
    step = torch.compile(recurrent_gated_linear_attention, backend="eager", fullgraph=True)
    options = {"initial_state": make_state(inputs), "return_state": True}
    expected = recurrent_gated_linear_attention(**inputs, **options)
    assert_close(step(**inputs, **options), expected, 1e-6)


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from supra.kernels.gated_linear_attention import chunk_gated_linear_attention as f;"
        "x = torch.ones(1, 3, 1, 2); y = f(x, x, x, log_decay=0 * x)[0];"
        "assert y[0, :, 0, 0].tolist() == [2, 4, 6]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
