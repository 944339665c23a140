"""Every method finds the loop's states and gradients, or reports that it does not converge."""

import pytest
import torch

from supra.errors import UserError
from supra.parallel import (
    GRU,
    LSTM,
    METHODS,
    FunctionCell,
    NonlinearGated,
    NotConverged,
    ParaGRU,
    solve,
)
from supra.parallel.solve import LARGEST, choose_method
from tests.parallel.examples import NAMES, example, expanding

PARALLEL = METHODS[1:]


@pytest.mark.parametrize("method", PARALLEL)
@pytest.mark.parametrize("name", NAMES)
def test_states_and_gradients_are_the_loops(name, method):
    cell, inputs, state, leaves = example(name)
    expected = solve(cell, inputs, state, "sequential").states
    found = solve(cell, inputs, state, method, otherwise="raise")
    assert found.converged and found.method == method and not found.fell_back
    assert found.residual <= 1e-12
    assert (found.states - expected).abs().max() < 1e-10
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    truth = torch.autograd.grad((expected * probe).sum(), leaves)
    gradients = torch.autograd.grad((found.states * probe).sum(), leaves)
    for gradient, right in zip(gradients, truth, strict=True):
        assert (gradient - right).abs().max() < 1e-8 * right.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_are_the_loops_alone(method):
    """A gradient penalty; the incoming gradient is ones and requires no gradient."""
    cell, inputs, state, _ = example("gru")
    penalised = solve(cell, inputs, state, method, otherwise="raise").states.sum()
    if method == "sequential":
        (gradient,) = torch.autograd.grad(penalised, inputs, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), inputs)
        assert second.abs().max() > 0
    else:
        with pytest.raises(RuntimeError, match=r"second derivatives .* method='sequential'"):
            torch.autograd.grad(penalised, inputs, create_graph=True)


@pytest.mark.parametrize("name", ["gru", "para_lstm", "nonlinear_gated"])
@pytest.mark.parametrize("estimate", ["smoother", "filter"])
@pytest.mark.parametrize("trust_region", [0.1, "auto"])
@pytest.mark.parametrize("method", ["elk", "quasi_elk"])
def test_elk_with_either_estimate(name, estimate, method, trust_region):
    cell, inputs, state, _ = example(name)
    expected = solve(cell, inputs, state, "sequential").states
    found = solve(
        cell, inputs, state, method,
        estimate=estimate, trust_region=trust_region, otherwise="raise",
    )  # fmt: skip
    assert (found.states - expected).abs().max() < 1e-10


@pytest.mark.parametrize("method", PARALLEL)
@pytest.mark.parametrize("name", ["gru", "para_gru"])
def test_a_sweep_makes_one_more_state_exact(name, method):
    """Also with a guess that is unrelated to the solution."""
    cell, inputs, state, _ = example(name, tokens=12)
    expected = solve(cell, inputs, state, "sequential").states
    guess = torch.full_like(expected, 0.3)
    for sweeps in (1, 4, 7):
        with pytest.raises(NotConverged), torch.no_grad():
            solve(cell, inputs, state, method, guess=guess, max_iterations=sweeps, tolerance=0.0,
                  otherwise="raise")  # fmt: skip
        states = _after(cell, inputs, state, method, guess, sweeps)
        assert (states[:, :sweeps] - expected[:, :sweeps]).abs().max() < 1e-13


def _after(cell, inputs, state, method, guess, sweeps):
    from supra.parallel.solve import _Sweeps
    from supra.parallel.trust_region import TrustRegion

    region = TrustRegion(cell.structure, "auto", 0.0, smooth=True) if "elk" in method else None
    run = _Sweeps(cell, cell.project(inputs), state, method, trust_region=region)
    return run.run(guess, -1.0, sweeps).states


def test_sweeps_of_a_contracting_cell_do_not_grow_with_length():
    counts = {}
    for tokens in (128, 1024):
        cell, inputs, state, _ = example("function", tokens=tokens)
        counts[tokens] = solve(cell, inputs, state, "deer").iterations
    assert counts[1024] <= counts[128] + 1 <= 9


@pytest.mark.parametrize(
    "options",
    [{"method": "deer"}, {"method": "quasi_deer"},
     {"method": "quasi_deer", "diagonal": "stochastic"}],
    ids=["deer", "quasi_deer", "stochastic"],
)  # fmt: skip
def test_a_linear_cell_takes_one_sweep(options):
    """Its Jacobian is diagonal, so the diagonal is all of it."""
    rates = torch.linspace(0.5, 0.95, 5, dtype=torch.float64)
    cell = FunctionCell(lambda state, x: rates * state + x, 5)
    found = solve(cell, torch.randn(2, 77, 5).double(), **options, otherwise="raise")
    assert found.iterations == 1


def test_an_expanding_cell_overflows_newton_and_not_elk():
    cell = expanding(1.6, width=16)
    inputs = torch.randn(1, 256, 16, generator=torch.Generator().manual_seed(0)).double()
    newton = solve(cell, inputs, None, "deer", max_iterations=256)
    assert newton.resets > 0 and newton.iterations > 10
    with pytest.warns(UserWarning, match="elk left a residual"):
        elk = solve(cell, inputs, None, "elk", max_iterations=20, trust_region=1.0)
    assert elk.resets == 0


def test_what_does_not_converge_is_said():
    cell, inputs, state, _ = example("gru")
    expected = solve(cell, inputs, state, "sequential").states
    with pytest.raises(NotConverged, match=r"jacobi left a residual of .* after 3 sweeps over 77"):
        solve(cell, inputs, state, "jacobi", max_iterations=3, otherwise="raise")
    with pytest.warns(UserWarning, match="a loop over the tokens takes over"):
        found = solve(cell, inputs, state, "jacobi", max_iterations=3)
    assert found.fell_back and not found.converged and found.iterations == 3
    assert found.residual > 1e-3
    assert torch.equal(found.states, expected)


def test_no_number_is_a_reset():
    """The method recovers from an input that once makes Newton's step infinite."""
    cell, inputs, state, _ = example("para_gru")
    guess = torch.full_like(solve(cell, inputs, state, "sequential").states, 2 * LARGEST)
    guess[:, 5] = torch.nan
    found = solve(cell, inputs, state, "deer", guess=guess, max_iterations=200, otherwise="raise")
    expected = solve(cell, inputs, state, "sequential").states
    assert (found.states - expected).abs().max() < 1e-10


def test_a_guess_is_where_it_begins():
    cell, inputs, state, _ = example("gru")
    right = solve(cell, inputs, state, "sequential").states
    assert solve(cell, inputs, state, "deer", guess=right).iterations == 0
    cell, inputs, state, _ = example("nonlinear_gated")
    linear, zeros = (solve(cell, inputs, state, "deer", guess=x) for x in ("linear", "zeros"))
    assert linear.iterations <= zeros.iterations


def test_stochastic_diagonals_need_no_jacobian():
    cell, inputs, state, _ = example("gru")
    expected = solve(cell, inputs, state, "sequential").states
    cell.linearise = None
    with torch.no_grad():
        found = solve(cell, inputs, state, "quasi_deer", diagonal="stochastic", otherwise="raise")
    assert (found.states - expected).abs().max() < 1e-10
    assert found.iterations > 5


def test_float32_meets_its_tolerance():
    cell, inputs, state, _ = example("para_gru", tokens=300)
    expected = solve(cell, inputs, state, "sequential").states
    found = solve(cell.float(), inputs.float(), state.float(), "deer", otherwise="raise")
    assert found.states.dtype == torch.float32
    assert (found.states - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("width", "tokens", "expected"),
    [(8, 200, "deer"), (8, 20, "sequential"), (300, 200, "sequential")],
)
def test_auto_takes_the_loop_where_scans_do_not_pay(width, tokens, expected):
    cell = ParaGRU(3, width)
    inputs = torch.randn(1, tokens, 3, generator=torch.Generator().manual_seed(0))
    assert solve(cell, inputs).method == expected


@pytest.mark.parametrize(
    ("cell", "tokens", "expected"),
    [
        (GRU(3, 16), 256, "deer"),
        (GRU(3, 16), 255, "sequential"),
        (GRU(3, 17), 256, "sequential"),
        (LSTM(3, 12), 256, "deer"),  # 24 numbers
        (LSTM(3, 13), 256, "sequential"),
        (FunctionCell(lambda state, x: x.sum(-1, keepdim=True) + 0.1 * state, 1), 256,
         "sequential"),
    ],
)  # fmt: skip
def test_auto_takes_deer_for_small_dense_cells(cell, tokens, expected):
    assert choose_method(cell, cell.empty_state((torch.zeros(1, tokens, 3),)), tokens) == expected


@pytest.mark.parametrize(("largest", "expected"), [(0.9, "deer"), (2.4, "sequential")])
def test_auto_takes_the_loop_where_newton_may_not_converge(largest, expected):
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 200, 1, 4, generator=generator) for _ in range(2))
    cell = NonlinearGated(torch.full((1, 4, 4), largest))
    assert solve(cell, (key, value, -torch.ones(1, 200, 1))).method == expected
    assert solve(ParaGRU(3, 8, largest=largest), torch.randn(1, 200, 3)).method == expected


def test_one_token_and_no_gradient():
    cell = ParaGRU(3, 4)
    inputs = torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = solve(cell, inputs, None, "deer")
    assert found.states.shape == (1, 1, 4) and not found.states.requires_grad


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "newton"}, "method"),
        ({"method": "deer", "trust_region": 0.0}, r"trust_region \(=0.0\) must be 'auto', or a"),
        ({"trust_region": float("inf")}, r"trust_region \(=inf\) must be 'auto', or a finite"),
        ({"method": "sequential", "trust_region": -1}, r"trust_region \(=-1\) must be 'auto'"),
        ({"trust_region": "wide"}, r"trust_region \(='wide'\) must be 'auto', or a finite number"),
        ({"trust_region": None}, r"trust_region \(=None\) must be 'auto', or a finite number > 0"),
        ({"tolerance": -1.0}, r"tolerance \(=-1.0\) must be >= 0 and finite"),
        ({"tolerance": float("nan")}, r"tolerance \(=nan\) must be >= 0 and finite"),
        ({"max_iterations": 0}, r"max_iterations \(=0\) must be a whole number >= 1"),
        ({"method": "deer", "probes": 0}, r"probes \(=0\) must be a whole number >= 1"),
        ({"method": "sequential", "guess": "zero"}, "did you mean 'zeros'"),
        ({"method": "elk", "estimate": "mean"}, "estimate"),
        (
            {"method": "deer", "guess": "linear"},
            r"guess \(='linear'\) does not fit: GRU has no linear part",
        ),
        ({"method": "deer", "otherwise": "hope"}, "otherwise"),
    ],
)
def test_what_is_no_option(given, message):
    cell, inputs, state, _ = example("gru")
    with pytest.raises(UserError, match=message):
        solve(cell, inputs, state, **given)


@pytest.mark.parametrize("tokens", [7, 128])  # of which "auto" reads the first by a loop
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"initial_state": torch.zeros(1, 6)},
            r"initial_state \(shape \[1, 6\]\) must have shape \[2, 6\]",
        ),
        (
            {"guess": torch.zeros(2, 6)},
            r"guess \(shape \[2, 6\]\) must have shape \[2, {tokens}, 6\]",
        ),
        ({"inputs": torch.zeros(2, 0, 5)}, r"inputs \(B, T = \[2, 0\]\) must have at least one"),
        ({"inputs": torch.zeros(0, 9, 5)}, r"inputs \(B, T = \[0, 9\]\) must have at least one"),
    ],
)
def test_shapes_that_do_not_fit_are_named_at_any_length(given, message, tokens):
    with pytest.raises(UserError, match=message.replace("{tokens}", str(tokens))):
        solve(ParaGRU(5, 6), **{"inputs": torch.zeros(2, tokens, 5)} | given)


def test_no_tokens_of_a_cell_with_a_matrix_state():
    with pytest.raises(UserError, match="must have at least one row and one token"):
        solve(
            NonlinearGated(torch.zeros(1, 4, 4)),
            [torch.zeros(1, 0, 1, 4)] * 2 + [torch.zeros(1, 0, 1)],
        )
