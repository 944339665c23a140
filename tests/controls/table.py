"""Every planted bug, in one list."""

from tests.controls import conversion, evaluation, kernels, model, solvers, training

BUGS = [
    bug for part in (training, conversion, model, solvers, kernels, evaluation) for bug in part.BUGS
]
