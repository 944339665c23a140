"""Bugs in the solvers of nonlinear recurrences and their gradients."""

from tests.controls.bug import Bug

SOLVE, SCAN, KALMAN, REGION = (
    f"supra/parallel/{name}.py" for name in ("solve", "scan", "kalman", "trust_region")
)
SOLVED, SCANNED = "tests/parallel/test_solve.py", "tests/parallel/test_scan.py"
STEP = f"{SCANNED}::test_the_smoother_is_a_dense_levenberg_marquardt_step"
ADAPTS = "tests/parallel/test_trust_region.py"
EQUAL = f"{SOLVED}::test_states_and_gradients_are_the_loops"

BUGS = [
    Bug(
        "deer_without_jacobian",
        "DEER's sweeps take the Jacobian for zero",
        SOLVE,
        "return value, matrix if",
        "return value, 0 * matrix if",
        (f"{SOLVED}::test_sweeps_of_a_contracting_cell_do_not_grow_with_length",),
    ),
    Bug(
        "quasi_deer_without_jacobian",
        "quasi-DEER's sweeps take the diagonal for zero",
        SOLVE,
        "else cell.structure.diagonal(",
        "else 0 * cell.structure.diagonal(",
        (f"{SOLVED}::test_a_linear_cell_takes_one_sweep",),
    ),
    Bug(
        "stochastic_diagonal_without_signs",
        "the stochastic diagonal is the product of the Jacobian and the signs alone",
        SOLVE,
        "total += signs * moved",
        "total += moved",
        (f"{SOLVED}::test_a_linear_cell_takes_one_sweep",),
    ),
    Bug(
        "scan_in_the_wrong_order",
        "a scan multiplies the maps of two stretches in reverse",
        SCAN,
        "structure.compose(matrix[:, :, t], through)",
        "structure.compose(through, matrix[:, :, t])",
        (f"{SCANNED}::test_affine_scan_is_the_loop",),
    ),
    Bug(
        "scan_without_initial_state",
        "a scan begins with zeros",
        SCAN,
        "initial.to(x.dtype)",
        "torch.zeros_like(x[:, 0])",
        (f"{SCANNED}::test_affine_scan_is_the_loop",),
    ),
    Bug(
        "later_before_earlier",
        "an associative scan combines neighbours in reverse",
        SCAN,
        "combine(even, odd)",
        "combine(odd, even)",
        (f"{SCANNED}::test_associative_scan_keeps_the_order",),
    ),
    Bug(
        "elk_with_another_damping",
        "ELK's gain is not that of its trust region",
        KALMAN,
        "damping / (1 + damping)",
        "damping / (1 + 2 * damping)",
        (STEP,),
    ),
    Bug(
        "elk_drops_a_covariance",
        "ELK's filter forgets the uncertainty of the later stretch",
        KALMAN,
        "form.transpose(a2)) + c2",
        "form.transpose(a2))",
        (STEP,),
    ),
    Bug(
        "elk_is_the_filter",
        "ELK returns the means of its filter as those of its smoother",
        KALMAN,
        "if not smooth:",
        "if True:",
        (STEP,),
    ),
    Bug(
        "quasi_elk_multiplies",
        "quasi-ELK multiplies where it has to divide",
        KALMAN,
        "return x / by",
        "return x * by",
        (STEP,),
    ),
    Bug(
        "trust_region_adapts_the_wrong_way",
        "ELK moves farther where the residual rose",
        REGION,
        "self.damping / FACTOR, self.damping * FACTOR",
        "self.damping * FACTOR, self.damping / FACTOR",
        (f"{ADAPTS}::test_lambda_falls_where_the_residual_falls",),
    ),
    Bug(
        "trust_region_moves_solved_states",
        "ELK moves states that are solved",
        REGION,
        "return torch.where(known, target, moved)",
        "return moved",
        (f"{SOLVED}::test_a_sweep_makes_one_more_state_exact",),
    ),
    Bug(
        "rows_that_move_on",
        "a row that has converged moves on while others sweep",
        SOLVE,
        "torch.where(residuals <= tolerance, states, following)",
        "following",
        (f"{ADAPTS}::test_rows_do_not_change_each_other",),
    ),
    Bug(
        "gradient_of_the_transposed_jacobian",
        "the adjoint recurrence does not transpose the Jacobians",
        SOLVE,
        "structure.transpose(later), gradient",
        "later, gradient",
        (EQUAL,),
    ),
    Bug(
        "gradient_one_token_late",
        "the adjoint recurrence uses the Jacobian of the token itself",
        SOLVE,
        "later = torch.cat([matrix[:, 1:], torch.zeros_like(matrix[:, :1])], dim=1)",
        "later = matrix",
        (EQUAL,),
    ),
    Bug(
        "jacobian_without_a_gate",
        "the Jacobian of the diagonal GRU forgets the reset gate's part",
        "supra/parallel/cells.py",
        "inner = reset + state * reset * (1 - reset) * a_reset",
        "inner = reset",
        ("tests/parallel/test_cells.py::test_jacobians_are_automatic_ones",),
    ),
]
