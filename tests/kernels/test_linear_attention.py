"""Linear attention: every form against the float64 recurrence, and each promise of the contract."""

import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from supra.kernels.linear_attention import (
    LinearAttentionState,
    chunk_linear_attention,
    recurrent_linear_attention,
)
from supra.kernels.linear_attention.api import OPERATOR

DECAYS = (None, ("head", "query"), ("head", "key"), ("token", "query"), ("token", "key"))
FORMS = tuple(product(DECAYS, (None, "sum")))


def make_inputs(
    batch, length, heads, kv_heads, width, value_width, decay, dtype=torch.float64, seed=0
):
    """query, key >= 0 (as a normalizer needs), value, log_decay; all with requires_grad."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "query": uniform(batch, length, heads, width) + 0.1,
        "key": uniform(batch, length, kv_heads, width) + 0.1,
        "value": uniform(batch, length, kv_heads, value_width) * 2 - 1,
    }
    if decay is not None:
        form, group = decay
        state_heads = heads if group == "query" else kv_heads
        shape = (state_heads,) if form == "head" else (batch, length, state_heads)
        inputs["log_decay"] = -0.3 * uniform(*shape)
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def make_state(inputs, normalize, sequences=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    heads = inputs["log_decay"].shape[-1] if "log_decay" in inputs else key.shape[2]
    shape = (sequences or query.shape[0], heads, key.shape[3], value.shape[3])
    memory = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    normalizer = torch.rand(shape[:3], generator=generator, dtype=torch.float64)
    memory, normalizer = (x.to(query.dtype).requires_grad_() for x in (memory, normalizer))
    return LinearAttentionState(memory, normalizer if normalize else None)


def quadratic(query, key, value, log_decay=None, normalize=None, scale=1.0, eps=1e-6):
    """The masked-attention form, without a state."""
    heads, length = query.shape[2], query.shape[1]
    group = heads // key.shape[2]
    key, value = (x.repeat_interleave(group, 2) for x in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key)
    if log_decay is not None:
        log_decay = log_decay.expand(*query.shape[:2], -1)
        log_decay = log_decay.repeat_interleave(heads // log_decay.shape[-1], -1)
        sums = log_decay.cumsum(1).transpose(1, 2)
        scores = scores * (sums[..., :, None] - sums[..., None, :]).tril().exp()
    scores = scores * torch.ones(length, length, dtype=scores.dtype).tril()
    scores = scores / (scores.sum(-1, keepdim=True) + eps) if normalize else scores * scale
    return torch.einsum("bhij,bjhd->bihd", scores, value)


def present(*tensors):
    return [x for x in tensors if x is not None]


def run_with_gradients(function, inputs, state=None, **options):
    """Output, final state and the gradients of a fixed mixture of them wrt all inputs."""
    output, end = function(**inputs, initial_state=state, return_state=True, **options)
    results = present(output, *end)
    loss = sum((x.double() * probe_like(x)).sum() for x in results)
    leaves = [*inputs.values(), *present(*(state or ()))]
    return [*results, *torch.autograd.grad(loss, leaves)]


def probe_like(x):
    generator = torch.Generator().manual_seed(x.numel())
    return torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.3


def assert_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-2)
        assert error < tolerance, f"result {i}: relative error {error:.1e}"


@pytest.mark.parametrize("length", [1, 7, 64, 65, 130])
@pytest.mark.parametrize(("decay", "normalize"), FORMS)
def test_all_forms_agree_with_the_reference(length, decay, normalize):
    for heads, kv_heads, width, value_width in ((1, 1, 8, 5), (3, 1, 5, 20), (6, 2, 20, 4)):
        inputs = make_inputs(2, length, heads, kv_heads, width, value_width, decay)
        options = {"normalize": normalize, "scale": 0.7}
        expected, _ = chunk_linear_attention(**inputs, **options, backend="reference")
        found = [
            chunk_linear_attention(**inputs, **options)[0],
            chunk_linear_attention(**inputs, **options, chunk_size=20)[0],
            recurrent_linear_attention(**inputs, **options)[0],
            quadratic(**inputs, **options),
        ]
        assert_close(found, [expected] * 4, 1e-10)


@pytest.mark.parametrize(("decay", "normalize"), FORMS)
def test_float32_is_within_rounding_of_the_reference(decay, normalize):
    for length, heads, kv_heads in ((7, 3, 1), (90, 6, 2)):
        inputs = make_inputs(2, length, heads, kv_heads, 20, 5, decay, torch.float32)
        state = make_state(inputs, normalize)
        options = {"normalize": normalize, "scale": 0.7}
        expected = run_with_gradients(
            chunk_linear_attention, inputs, state, **options, backend="reference"
        )
        assert_close(
            run_with_gradients(chunk_linear_attention, inputs, state, **options), expected, 1e-5
        )
        assert_close(
            run_with_gradients(recurrent_linear_attention, inputs, state, **options), expected, 1e-5
        )


@pytest.mark.parametrize(("decay", "normalize"), FORMS)
def test_gradients_agree_with_the_reference(decay, normalize):
    inputs = make_inputs(2, 45, 6, 2, 5, 4, decay)
    state = make_state(inputs, normalize)
    options = {"normalize": normalize, "scale": 0.7, "eps": 0.1}
    expected = run_with_gradients(
        chunk_linear_attention, inputs, state, **options, backend="reference"
    )
    found = run_with_gradients(chunk_linear_attention, inputs, state, **options, chunk_size=16)
    assert_close(found, expected, 1e-10)
    found = run_with_gradients(recurrent_linear_attention, inputs, state, **options)
    assert_close(found, expected, 1e-10)


@pytest.mark.parametrize(("decay", "normalize"), FORMS)
@pytest.mark.parametrize("function", [chunk_linear_attention, recurrent_linear_attention])
def test_gradcheck(function, decay, normalize):
    inputs = make_inputs(1, 4, 2, 1, 3, 2, decay)
    state = make_state(inputs, normalize)
    options = {"chunk_size": 2} if function is chunk_linear_attention else {}

    def run(*leaves):
        named = dict(zip(inputs, leaves, strict=False))
        memory, normalizer = (*leaves[len(inputs) :], None)[:2]
        output, end = function(
            **named,
            normalize=normalize,
            eps=0.1,
            initial_state=LinearAttentionState(memory, normalizer),
            return_state=True,
            **options,
        )
        return tuple(present(output, *end))

    assert torch.autograd.gradcheck(run, (*inputs.values(), *present(*state)), fast_mode=False)


@pytest.mark.parametrize(("decay", "normalize"), FORMS)
def test_two_segments_with_carried_state_are_one_run(decay, normalize):
    inputs = make_inputs(2, 75, 3, 1, 5, 4, decay)
    whole, end = chunk_linear_attention(
        **inputs, normalize=normalize, return_state=True, chunk_size=16
    )

    def segment(begin, stop):
        return {name: x if x.dim() == 1 else x[:, begin:stop] for name, x in inputs.items()}

    for first, second in product((chunk_linear_attention, recurrent_linear_attention), repeat=2):
        head, state = first(**segment(0, 37), normalize=normalize, return_state=True)
        tail, state = second(
            **segment(37, 75), normalize=normalize, return_state=True, initial_state=state
        )
        found = [torch.cat((head, tail), 1), *present(*state)]
        assert_close(found, [whole, *present(*end)], 1e-10)


@pytest.mark.parametrize(("decay", "normalize"), FORMS)
def test_packed_sequences_are_the_same_as_separate_ones(decay, normalize):
    bounds = [0, 0, 1, 20, 20, 53, 54, 90]
    inputs = make_inputs(1, bounds[-1], 6, 2, 5, 4, decay)
    state = make_state(inputs, normalize, sequences=len(bounds) - 1)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)

    def separate(initial_state, **options):
        outputs, memories, normalizers = [], [], []
        for n, (begin, stop) in enumerate(pairwise(bounds)):
            start = LinearAttentionState(*(x if x is None else x[n : n + 1] for x in initial_state))
            if begin < stop:
                segment = {
                    name: x if x.dim() == 1 else x[:, begin:stop]
                    for name, x in options.items()
                    if name in inputs
                }
                output, start = chunk_linear_attention(
                    **segment, normalize=normalize, initial_state=start, return_state=True
                )
                outputs.append(output)
            memories.append(start.memory)
            normalizers.append(start.normalizer)
        normalizer = torch.cat(normalizers) if normalize else None
        return torch.cat(outputs, 1), LinearAttentionState(torch.cat(memories), normalizer)

    expected = run_with_gradients(
        lambda initial_state, return_state, **x: separate(initial_state, **x), inputs, state
    )
    for options in ({"chunk_size": 16}, {"chunk_size": 1}, {}, {"backend": "reference"}):
        found = run_with_gradients(
            chunk_linear_attention,
            inputs,
            state,
            normalize=normalize,
            cu_seqlens=cu_seqlens,
            **options,
        )
        assert_close(found, expected, 1e-10)


@pytest.mark.parametrize(("decay", "normalize"), FORMS)
def test_bfloat16_costs_no_more_than_its_own_rounding(decay, normalize):
    # Truth is float64 on the rounded inputs; the budget is what the float64 results themselves
    # lose when they are rounded to bfloat16. The normalized backward reads the rounded output, as
    # that of FlashAttention does, which costs up to 2.6 times as much.
    exact = {
        name: x.detach().bfloat16().double().requires_grad_()
        for name, x in make_inputs(2, 70, 3, 1, 20, 5, decay).items()
    }
    rounded = {name: x.detach().bfloat16().requires_grad_() for name, x in exact.items()}
    expected = run_with_gradients(chunk_linear_attention, exact, normalize=normalize, chunk_size=16)
    found = run_with_gradients(chunk_linear_attention, rounded, normalize=normalize, chunk_size=16)
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        budget = (b.bfloat16().double() - b).norm()
        assert (a.double() - b).norm() < (3 if normalize else 1.5) * budget + 1e-5 * b.norm()


@pytest.mark.parametrize("decay", DECAYS)
def test_autocast_changes_nothing(decay):
    inputs = make_inputs(1, 20, 3, 1, 8, 5, decay, torch.float32)
    expected = run_with_gradients(chunk_linear_attention, inputs, normalize="sum")
    step, _ = recurrent_linear_attention(**inputs, normalize="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_with_gradients(chunk_linear_attention, inputs, normalize="sum")
        assert torch.equal(recurrent_linear_attention(**inputs, normalize="sum")[0], step)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reset", [-1e4, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [None, "sum"])
def test_a_reset_forgets_everything_and_keeps_gradients_finite(reset, dtype, normalize):
    inputs = make_inputs(1, 50, 2, 2, 5, 4, ("token", "key"), dtype)
    resets = [0, 5, 6, 20, 33]
    with torch.no_grad():
        inputs["log_decay"][:, resets] = reset
    state = make_state(inputs, normalize)
    expected = run_with_gradients(
        chunk_linear_attention, inputs, state, normalize=normalize, backend="reference"
    )
    for function, options in (
        (chunk_linear_attention, {"chunk_size": 16}),
        (recurrent_linear_attention, {}),
    ):
        found = run_with_gradients(function, inputs, state, normalize=normalize, **options)
        # five resets raise the sums to 500, of which float32 keeps 3e-5
        assert_close(found, expected, 1e-10 if dtype == torch.float64 else 5e-5)
        d_memory = found[-1 if normalize is None else -2]
        assert d_memory.abs().max() < 1e-40


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("normalize", [None, "sum"])
def test_decays_may_be_wide_within_a_chunk(normalize, dtype, tolerance):
    """Sums of logs reach hundreds in the first head, and stay near zero in the second."""
    inputs = make_inputs(2, 150, 2, 2, 9, 6, ("token", "key"), dtype)
    with torch.no_grad():
        inputs["log_decay"] *= torch.tensor([60.0, 0.1], dtype=dtype)
    state = make_state(inputs, normalize)
    expected, found = (
        run_with_gradients(
            chunk_linear_attention, inputs, state, normalize=normalize, backend=backend
        )
        for backend in ("reference", "torch")
    )
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_query_and_a_key_may_be_expanded_to_all_heads(decay):
    inputs = make_inputs(1, 130, 40, 40, 9, 6, decay)  # a block for each chunk
    for name in ("query", "key"):
        inputs[name] = inputs[name][:, :, :1].detach().requires_grad_()

    def spread_by(spread):
        def run(query, key, value, **others):
            return chunk_linear_attention(spread(query), spread(key), value, **others)

        return run_with_gradients(run, inputs)

    expanded = spread_by(lambda x: x.expand(-1, -1, 40, -1))
    assert_close(expanded, spread_by(lambda x: x.repeat(1, 1, 40, 1)), 1e-12)


@pytest.mark.parametrize("position", [0, 70])
def test_a_head_that_diverged_holds_nothing_up(position):
    inputs = make_inputs(1, 130, 2, 2, 16, 12, ("token", "key"))
    whole, _ = chunk_linear_attention(**inputs, backend="torch")
    with torch.no_grad():
        inputs["log_decay"][:, position, 1] = torch.nan
    found, _ = chunk_linear_attention(**inputs, backend="torch")
    assert_close(found[:, :, 0], whole[:, :, 0], 1e-12)
    assert found[:, position + 1 :, 1].isnan().all()


@pytest.mark.parametrize("reset", [-1e4, -torch.inf])
@pytest.mark.parametrize("function", [chunk_linear_attention, recurrent_linear_attention])
def test_a_head_that_forgets_at_once_sees_its_own_token_only(function, reset):
    inputs = make_inputs(1, 20, 2, 2, 5, 4, ("head", "key"), torch.float32)
    with torch.no_grad():
        inputs["log_decay"][0] = reset
    found = run_with_gradients(function, inputs)
    assert all(x.isfinite().all() for x in found)
    own = (inputs["query"] * inputs["key"]).sum(-1, keepdim=True) * inputs["value"]
    torch.testing.assert_close(found[0][:, :, 0], own[:, :, 0])


@pytest.mark.parametrize("decay", DECAYS)
def test_no_gradient_flows_from_the_past_to_the_future(decay):
    inputs = make_inputs(1, 40, 3, 1, 5, 4, decay)
    output, _ = chunk_linear_attention(**inputs, normalize="sum", chunk_size=16)
    tensors = {name: x for name, x in inputs.items() if x.dim() > 1}
    for t in (0, 15, 16, 38):
        gradients = torch.autograd.grad(
            output[:, t].square().sum(), tensors.values(), retain_graph=True
        )
        for name, gradient in zip(tensors, gradients, strict=True):
            assert torch.all(gradient[:, t + 1 :] == 0), (name, t)
            if name != "log_decay":  # token 0 has no past that its decay could change
                assert torch.any(gradient[:, : t + 1] != 0), (name, t)


@pytest.mark.parametrize("function", [chunk_linear_attention, recurrent_linear_attention])
def test_inputs_need_not_be_contiguous(function):
    inputs = make_inputs(2, 20, 6, 2, 5, 4, ("token", "query"))
    expected = run_with_gradients(function, inputs, normalize="sum")
    strided = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for name, x in inputs.items()
    }
    assert not any(x.is_contiguous() for x in strided.values())
    assert_close(run_with_gradients(function, strided, normalize="sum"), expected, 1e-12)


@pytest.mark.parametrize(("decay", "normalize"), FORMS)
@pytest.mark.parametrize("function", [chunk_linear_attention, recurrent_linear_attention])
def test_meta_device_gives_shapes(function, decay, normalize):
    inputs = make_inputs(2, 70, 6, 2, 5, 4, decay, torch.bfloat16)
    heads = inputs["log_decay"].shape[-1] if decay else 2
    inputs = {name: x.to("meta") for name, x in inputs.items()}
    output, state = function(**inputs, normalize=normalize, return_state=True)
    assert (output.shape, output.dtype) == ((2, 70, 6, 4), torch.bfloat16)
    assert (state.memory.shape, state.memory.dtype) == ((2, heads, 5, 4), torch.float32)
    if normalize:
        assert state.normalizer.shape == (2, heads, 5)


def test_the_given_state_is_not_changed():
    inputs = make_inputs(1, 1, 3, 1, 5, 4, ("head", "query"))
    for function in (chunk_linear_attention, recurrent_linear_attention):
        state = make_state(inputs, "sum")
        before = [x.detach().clone() for x in state]
        _, end = function(**inputs, normalize="sum", initial_state=state, return_state=True)
        assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
        assert not torch.equal(end.memory, state.memory)


def test_state_is_returned_only_on_request():
    inputs = make_inputs(1, 3, 1, 1, 5, 4, None)
    assert chunk_linear_attention(**inputs)[1] is None
    assert recurrent_linear_attention(**inputs)[1] is None


def test_backward_saves_no_scores_and_no_states():
    inputs = make_inputs(1, 512, 2, 2, 8, 8, ("head", "key"), torch.float32)
    saved = []

    def keep(x):
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        chunk_linear_attention(**inputs)
    scores = 512 * 2 * 64
    assert sum(saved) < scores


def test_one_step_compiles_without_a_graph_break():
    inputs = make_inputs(2, 1, 6, 2, 5, 4, ("token", "query"), torch.float32)
    state = make_state(inputs, "sum")
    step = torch.compile(recurrent_linear_attention, backend="eager", fullgraph=True)
    options = {"normalize": "sum", "initial_state": state, "return_state": True}
    expected, end = recurrent_linear_attention(**inputs, **options)
    found, compiled_end = step(**inputs, **options)
    assert_close([found, *compiled_end], [expected, *end], 1e-6)


def test_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch;"
        "from supra.kernels.linear_attention import chunk_linear_attention as f;"
        "x = torch.ones(1, 3, 1, 2); assert f(x, x, x)[0][0, :, 0, 0].tolist() == [2, 4, 6]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("decay", "normalize"), FORMS)
def test_custom_ops_are_sound(decay, normalize):
    inputs = make_inputs(1, 20, 4, 2, 5, 4, decay, torch.float32)
    state = make_state(inputs, normalize, sequences=3)
    cu_seqlens = torch.tensor([0, 3, 3, 20])
    arguments = (
        *(inputs.get(name) for name in ("query", "key", "value", "log_decay")),
        *state, cu_seqlens, normalize == "sum", 0.7, 1e-6, 16, "torch",
    )  # fmt: skip
    torch.library.opcheck(OPERATOR.forward, arguments)
    output, memory, normalizer, weights = (x.detach() for x in OPERATOR.forward(*arguments))
    d_normalizer = torch.ones_like(normalizer) if normalize else None
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(
        OPERATOR.backward,
        (output, memory, d_normalizer, *arguments[:7], output, weights, *arguments[7:]),
    )


def test_training_compiles_without_a_graph_break():
    inputs = make_inputs(1, 40, 4, 2, 5, 4, ("token", "query"), torch.float32)
    cu_seqlens = torch.tensor([0, 3, 40])

    def loss(**inputs):
        output, state = chunk_linear_attention(
            **inputs, normalize="sum", cu_seqlens=cu_seqlens, return_state=True
        )
        return output.square().sum() + state.memory.sum()

    expected = torch.autograd.grad(loss(**inputs), inputs.values())
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_close(torch.autograd.grad(compiled(**inputs), inputs.values()), expected, 1e-6)


def test_activation_checkpointing_changes_nothing():
    inputs = make_inputs(1, 40, 4, 2, 5, 4, ("token", "query"), torch.float32)

    def loss(*leaves):
        return chunk_linear_attention(*leaves[:3], log_decay=leaves[3])[0].square().sum()

    expected = torch.autograd.grad(loss(*inputs.values()), inputs.values())
    again = checkpoint(loss, *inputs.values(), use_reentrant=False)
    found = torch.autograd.grad(again, inputs.values())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("decay", "normalize"), FORMS)
def test_a_step_in_place_is_a_step(decay, normalize, backend):
    inputs = {n: x.detach() for n, x in make_inputs(2, 2, 4, 2, 5, 4, decay).items()}
    state = LinearAttentionState(
        *(x if x is None else x.detach() for x in make_state(inputs, normalize))
    )
    options = {"normalize": normalize, "return_state": True, "backend": backend}
    expected, end = recurrent_linear_attention(**inputs, **options, initial_state=state)
    found, same = recurrent_linear_attention(
        **inputs, **options, initial_state=state, in_place=True
    )
    assert_close([found, *present(*state)], [expected, *present(*end)], 1e-12)
    assert all(a is b for a, b in zip(same, state, strict=True))


def test_decay_of_any_strength_keeps_float32s_digits():
    # chunks are cut where a head decays by more than exp(-80): by two tokens here, at resets there
    for strength in (0.01, 0.5, 3.0, 50.0):
        inputs = make_inputs(1, 200, 2, 2, 8, 4, ("token", "key"), torch.float32)
        with torch.no_grad():
            inputs["log_decay"][..., 0] *= strength / 0.3
        expected = run_with_gradients(chunk_linear_attention, inputs, backend="reference")
        assert_close(run_with_gradients(chunk_linear_attention, inputs), expected, 1e-5)


def test_memory_of_a_long_text_is_flat():
    """What is allocated at once, beside inputs and outputs, does not grow with the length."""
    peaks = []
    for length in (2048, 16384):
        x = torch.zeros(1, length, 1, 16)
        with torch.profiler.profile(profile_memory=True) as profile:
            chunk_linear_attention(x, x, x, log_decay=torch.zeros(1, length, 1))
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks.append(peak - 4 * length * 16)
    # the decay's sums and factors are 6 numbers a token and head, of which 4 have 8 bytes
    assert peaks[1] - peaks[0] < (16384 - 2048) * 80, peaks
