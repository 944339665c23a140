"""Long convolution: every form against the float64 recurrence, and what the contract says."""

import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch

from supra.kernels.long_conv import chunk_ssm_conv, recurrent_ssm_conv
from supra.kernels.long_conv.api import OPERATOR

FORMS = (chunk_ssm_conv, recurrent_ssm_conv)
BY_TOKEN = ("query", "key", "value")
MODEL = ("log_decay", "frequency", "weight", "skip")


def make_inputs(batch, length, heads, widths, modes, dtype=torch.float64, seed=0, skip=True):
    """Inputs by name, all with requires_grad; widths: of a key and of a value, no gates for None.

    The model is float32 at the least, as an H3 layer starts: modes that forget within 20 tokens and
    ones that take 2000, turning by up to pi a token.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    step = (0.001 * 100 ** uniform(heads, 1)).expand(heads, modes)
    inputs = {
        "value": (uniform(batch, length, heads, widths[1]) * 2 - 1).to(dtype),
        "log_decay": (-step / 2).to(wide),
        "frequency": (torch.pi * step * torch.arange(modes)).to(wide),
        "weight": (uniform(heads, modes, 2) - 0.5).to(wide),
    }
    gates = (None, None)
    if widths[0] is not None:
        gates = ((uniform(batch, length, heads, widths[0]) * 2 - 1).to(dtype) for _ in range(2))
    inputs |= zip(("query", "key"), gates, strict=True)
    if skip:
        inputs["skip"] = uniform(heads).to(wide)
    return {n: x if x is None else x.contiguous().requires_grad_() for n, x in inputs.items()}


def make_state(inputs, sequences=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    value, key = inputs["value"], inputs["key"]
    widths = (1 if key is None else key.shape[3], value.shape[3])
    shape = (sequences or len(value), *inputs["log_decay"].shape, 2, *widths)
    state = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return state.to(inputs["log_decay"].dtype).requires_grad_()


def quadratic(query, key, value, log_decay, frequency, weight, skip=None):
    """The masked form, without a state: the kernel tap by tap, in a Toeplitz matrix."""
    length = value.shape[1]
    ages = torch.arange(length)
    modes = torch.polar(log_decay.exp(), frequency)[..., None] ** ages
    taps = 2 * (torch.view_as_complex(weight)[..., None] * modes).real.sum(1)
    lags = ages[:, None] - ages
    toeplitz = torch.where(lags >= 0, taps[:, lags.clamp(min=0)], 0.0)
    if skip is not None:
        toeplitz = toeplitz + skip[:, None, None] * torch.eye(length)
    if query is None:
        return torch.einsum("hij,bjhv->bihv", toeplitz, value)
    scores = torch.einsum("bihk,bjhk,hij->bhij", query, key, toeplitz)
    return torch.einsum("bhij,bjhv->bihv", scores, value)


def run_with_gradients(function, inputs, state=None, **options):
    """Output, final state and the gradients of a fixed mixture of them wrt all inputs."""
    results = function(**inputs, initial_state=state, return_state=True, **options)
    loss = sum((x.double() * probe_like(x)).sum() for x in results)
    leaves = [x for x in (*inputs.values(), state) if x is not None]
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
    return {
        name: x[:, begin:stop] if name in BY_TOKEN and x is not None else x
        for name, x in inputs.items()
    }


def exact(inputs):
    return {
        name: x if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()
    }


@pytest.mark.parametrize("length", [1, 7, 64, 65, 130])
@pytest.mark.parametrize("widths", [(None, 1), (None, 3), (1, 1), (1, 3), (4, 4), (5, 3)])
def test_all_forms_agree_with_the_reference(length, widths):
    inputs = make_inputs(2, length, 3, widths, 5)
    expected, _ = chunk_ssm_conv(**inputs, backend="reference")
    found = [
        chunk_ssm_conv(**inputs)[0],
        chunk_ssm_conv(**inputs, chunk_size=20)[0],
        recurrent_ssm_conv(**inputs)[0],
        quadratic(**inputs),
    ]
    assert_close(found, [expected] * 4, 1e-13)


def test_by_hand():
    # one mode of half a turn a token and no decay: the kernel is 1, -1, 1, ...
    value = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64).view(1, -1, 1, 1)
    ones = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.tensor([[[0.5, 0.0]]], dtype=torch.float64)
    skip = torch.tensor([10.0], dtype=torch.float64)
    for function in FORMS:
        output, state = function(
            value, 2 * value, value, 0 * ones, torch.pi * ones, weight, skip, return_state=True
        )
        inside = [8.0, 18.0 - 8, 50.0 - 18 + 8]
        sums = [2 * (inside[0] + 80), 3 * (inside[1] + 180), 5 * (inside[2] + 500)]
        torch.testing.assert_close(output.flatten().tolist(), sums)
        torch.testing.assert_close(state.flatten().tolist(), [40.0, 0.0])


@pytest.mark.parametrize("widths", [(None, 2), (1, 1), (5, 3)])
@pytest.mark.parametrize("function", FORMS)
def test_float32_is_within_rounding_of_the_reference(function, widths):
    for length in (7, 140):
        inputs = make_inputs(2, length, 3, widths, 32, torch.float32)
        state = make_state(inputs)
        expected = run_with_gradients(function, exact(inputs), state.double(), backend="reference")
        assert_close(run_with_gradients(function, inputs, state), expected, 1e-6)


def test_a_long_memory_keeps_its_digits():
    # without the remainder of a^64 the state would be off by 2e-6 here
    inputs = make_inputs(1, 4096, 2, (1, 1), 2, torch.float32)
    inputs["log_decay"] = torch.full((2, 2), -1e-5)
    inputs["frequency"] = torch.tensor([[0.3, 1e-4], [2.9, 0.0]])
    with torch.no_grad():
        expected = chunk_ssm_conv(**exact(inputs), return_state=True)
        assert_close(chunk_ssm_conv(**inputs, return_state=True), expected, 4e-7)


@pytest.mark.parametrize("widths", [(None, 1), (1, 1), (1, 3), (4, 1), (5, 3)])
def test_gradients_agree_with_the_reference(widths):
    for chunk_size, skip in ((16, True), (20, False), (1, True), (None, True)):
        inputs = make_inputs(2, 75, 3, widths, 4, skip=skip)
        state = make_state(inputs)
        expected = run_with_gradients(chunk_ssm_conv, inputs, state, backend="reference")
        found = run_with_gradients(chunk_ssm_conv, inputs, state, chunk_size=chunk_size)
        assert_close(found, expected, 1e-12)


def test_blocks_do_not_show(monkeypatch):
    # of a group, rows and chunks: 3 rows of 75 tokens are groups of 2 and 1 rows, in 9 and 5 blocks
    inputs = make_inputs(3, 75, 2, (2, 3), 4)
    state = make_state(inputs)
    expected = run_with_gradients(chunk_ssm_conv, inputs, state, chunk_size=8)
    monkeypatch.setattr("supra.kernels.long_conv.torch_blocks.BLOCK", 2 * 6 * 2 * 8)
    monkeypatch.setattr("supra.kernels.long_conv.torch_blocks.PIECE", 5)
    found = run_with_gradients(chunk_ssm_conv, inputs, state, chunk_size=8)
    assert_close(found, expected, 1e-13)


@pytest.mark.parametrize("widths", [(None, 2), (1, 1), (2, 3)])
@pytest.mark.parametrize("function", FORMS)
def test_gradcheck(function, widths):
    inputs = make_inputs(1, 5, 2, widths, 2)
    state = make_state(inputs)
    options = {"chunk_size": 4} if function is chunk_ssm_conv else {}
    present = [name for name, x in inputs.items() if x is not None]

    def run(*leaves):
        named = inputs | dict(zip(present, leaves[:-1], strict=True))
        return function(**named, initial_state=leaves[-1], return_state=True, **options)

    assert torch.autograd.gradcheck(run, (*(inputs[n] for n in present), state), fast_mode=False)


@pytest.mark.parametrize("widths", [(None, 1), (1, 1), (3, 2)])
def test_two_segments_with_carried_state_are_one_run(widths):
    inputs = make_inputs(2, 75, 3, widths, 4)
    expected = chunk_ssm_conv(**inputs, return_state=True, chunk_size=16)
    for first, second in product(FORMS, repeat=2):
        head, state = first(**part(inputs, 0, 37), return_state=True)
        tail, state = second(**part(inputs, 37, 75), return_state=True, initial_state=state)
        assert_close([torch.cat((head, tail), 1), state], expected, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stream_of_segments_is_one_run_with_its_gradients(dtype):
    inputs = make_inputs(2, 300, 3, (1, 1), 8, dtype)
    bounds = [0, 1, 64, 200, 300]

    def streamed(initial_state, return_state, **inputs):
        outputs, state = [], initial_state
        for begin, stop in pairwise(bounds):
            given = part(inputs, begin, stop)
            output, state = chunk_ssm_conv(**given, initial_state=state, return_state=True)
            outputs.append(output)
        return torch.cat(outputs, 1), state

    expected = run_with_gradients(chunk_ssm_conv, inputs, make_state(inputs))
    found = run_with_gradients(streamed, inputs, make_state(inputs))
    assert_close(found, expected, 1e-13 if dtype == torch.float64 else 1e-6)


def test_the_response_to_an_impulse_is_the_kernel():
    inputs = make_inputs(1, 50, 3, (None, 1), 8)
    impulse = torch.zeros_like(inputs["value"])
    impulse[:, 0] = 1
    found, _ = chunk_ssm_conv(**inputs | {"value": impulse})
    modes = torch.polar(inputs["log_decay"].exp(), inputs["frequency"])[..., None]
    weight = torch.view_as_complex(inputs["weight"])[..., None]
    taps = 2 * (weight * modes ** torch.arange(50)).real.sum(1)
    taps[:, 0] += inputs["skip"]
    assert_close([found[0, ..., 0].mT], [taps], 1e-13)


@pytest.mark.parametrize("widths", [(None, 2), (1, 1), (3, 2)])
def test_packed_sequences_are_the_same_as_separate_ones(widths):
    bounds = [0, 0, 1, 20, 20, 53, 54, 90]
    inputs = make_inputs(1, bounds[-1], 3, widths, 4)
    state = make_state(inputs, sequences=len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)

    def separate(initial_state, return_state, **inputs):
        outputs, states = [], []
        for n, (begin, stop) in enumerate(pairwise(bounds)):
            end = initial_state[n : n + 1]
            if begin < stop:
                output, end = chunk_ssm_conv(
                    **part(inputs, begin, stop), initial_state=end, return_state=True
                )
                outputs.append(output)
            states.append(end)
        return torch.cat(outputs, 1), torch.cat(states)

    expected = run_with_gradients(separate, inputs, state)
    for options in ({"chunk_size": 16}, {"chunk_size": 1}, {}, {"backend": "reference"}):
        found = run_with_gradients(chunk_ssm_conv, inputs, state, cu_seqlens=cu_seqlens, **options)
        assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(None, 1), (1, 1), (4, 3)])
def test_16_bits_cost_their_own_rounding(widths, dtype):
    # Truth is float64 on the rounded inputs; the budget is what its results lose when they are
    # rounded. Gradients cost up to 1.5 times that, for the output's gradient is rounded too.
    rounded = make_inputs(2, 70, 3, widths, 8, dtype)
    expected = run_with_gradients(chunk_ssm_conv, exact(rounded), backend="reference")
    found = run_with_gradients(chunk_ssm_conv, rounded)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    leaves = [x for x in rounded.values() if x is not None]
    assert [x.dtype for x in found[2:]] == [x.dtype for x in leaves]
    for a, b in zip(found, expected, strict=True):
        budget = 1.6 * (b.to(dtype).double() - b).norm() + 1e-6 * b.norm()
        if a.dtype == torch.float32:  # sums over all tokens of what has 16 bits
            budget = torch.finfo(dtype).eps * b.norm()
        assert (a.double() - b).norm() < budget


def test_autocast_changes_nothing():
    inputs = make_inputs(1, 20, 3, (2, 5), 4, torch.float32)
    expected = run_with_gradients(chunk_ssm_conv, inputs)
    step, _ = recurrent_ssm_conv(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_with_gradients(chunk_ssm_conv, inputs)
        assert torch.equal(recurrent_ssm_conv(**inputs)[0], step)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modes_that_forget_at_once_and_ones_that_never_do(dtype):
    inputs = make_inputs(1, 50, 2, (2, 3), 5, dtype)
    with torch.no_grad():
        inputs["log_decay"][:] = torch.tensor([0, -torch.inf, -1e4, -3, -80.0])
    state = make_state(inputs)
    expected = run_with_gradients(
        chunk_ssm_conv, exact(inputs), state.double(), backend="reference"
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for function, options in zip(FORMS, ({"chunk_size": 16}, {}), strict=True):
        assert_close(run_with_gradients(function, inputs, state, **options), expected, tolerance)


@pytest.mark.parametrize("widths", [(None, 2), (1, 1), (3, 2)])
def test_no_gradient_flows_from_the_past_to_the_future(widths):
    inputs = make_inputs(1, 40, 3, widths, 4)
    output, _ = chunk_ssm_conv(**inputs, chunk_size=16)
    names = [name for name in BY_TOKEN if inputs[name] is not None]
    for t in (0, 15, 16, 38):
        gradients = torch.autograd.grad(
            output[:, t].square().sum(), [inputs[name] for name in names], retain_graph=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            assert torch.all(gradient[:, t + 1 :] == 0), (name, t)
            assert torch.any(gradient[:, : t + 1] != 0), (name, t)


@pytest.mark.parametrize("function", FORMS)
def test_inputs_need_not_be_contiguous(function):
    inputs = make_inputs(2, 20, 3, (5, 4), 4)
    expected = run_with_gradients(function, inputs)
    strided = {
        name: x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        if x.dim() > 1
        else x
        for name, x in inputs.items()
    }
    assert_close(run_with_gradients(function, strided), expected, 1e-13)


@pytest.mark.parametrize("widths", [(None, 2), (3, 4)])
@pytest.mark.parametrize("function", FORMS)
def test_meta_device_gives_shapes(function, widths):
    inputs = make_inputs(2, 70, 3, widths, 5, torch.bfloat16)
    inputs = {name: x if x is None else x.to("meta") for name, x in inputs.items()}
    output, state = function(**inputs, return_state=True)
    assert (output.shape, output.dtype) == ((2, 70, 3, widths[1]), torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 3, 5, 2, widths[0] or 1, widths[1]), torch.float32)


def test_decoding_in_place_writes_into_the_given_state():
    inputs = {n: x.detach() for n, x in make_inputs(2, 3, 2, (2, 3), 4, torch.float32).items()}
    state = make_state(inputs).detach()
    expected = recurrent_ssm_conv(**inputs, initial_state=state, return_state=True)
    for backend in ("torch", "reference"):
        mine = state.clone()
        output, end = recurrent_ssm_conv(
            **inputs, initial_state=mine, return_state=True, in_place=True, backend=backend
        )
        assert end is mine
        assert_close([output, end], expected, 1e-6)


@pytest.mark.parametrize("widths", [(None, 2), (3, 2)])
def test_the_operators_keep_torchs_rules(widths):
    inputs = make_inputs(1, 9, 2, widths, 3, torch.float32)
    cu_seqlens = torch.tensor([0, 4, 9])
    state = make_state(inputs, sequences=2)
    given = (*[inputs[name] for name in (*BY_TOKEN, *MODEL)], state, cu_seqlens, 4, "torch")
    torch.library.opcheck(OPERATOR.forward, given)
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
    torch.library.opcheck(OPERATOR.backward, (*OPERATOR.forward(*given), *given))


def test_without_triton_it_imports_and_runs():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from supra.kernels.long_conv import chunk_ssm_conv\n"
        "x = torch.ones(1, 3, 2, 1)\n"
        "chunk_ssm_conv(None, None, x, -x[0, 0], x[0, 0], torch.ones(2, 1, 2))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
