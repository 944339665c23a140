"""`supra bench parallel`: its table, its JSON, and what it measures."""

import json
import math

import pytest
import torch

from supra.bench.parallel import CELLS, expanding, lyapunov, report
from supra.cli import main
from supra.errors import UserError
from supra.parallel import FunctionCell, solve


def test_the_table(capsys):
    options = "--methods sequential,deer,jacobi --lengths 40 --widths 5 --repeats 1 --json"
    main(["bench", "parallel", "--cells", "para_gru,tanh 1.5", *options.split()])
    found = json.loads(capsys.readouterr().out)
    runs = {(run["cell"], run["method"]): run for run in found["runs"]}
    assert len(runs) == 6 and found["machine"] and found["torch"] == torch.__version__
    deer = runs["para_gru", "deer"]
    assert deer["converged"] and 1 <= deer["sweeps"] <= 8 and deer["error"] < 1e-5
    assert deer["milliseconds"] > 0 and deer["ratio"] > 0 and deer["numbers"] == 5
    assert runs["para_gru", "jacobi"]["sweeps"] > deer["sweeps"]
    assert runs["tanh 1.5", "sequential"]["exponent"] > runs["para_gru", "deer"]["exponent"]
    report(cells=["para_gru"], methods=["deer"], lengths=[20], widths=[4], repeats=1)
    printed = capsys.readouterr().out
    assert "| para_gru | 4 " in printed
    assert "para_gru, 4 numbers, 20 tokens: deer, " in printed


def test_the_exponent_of_a_linear_cell():
    """The exponent of x' = A x + u with eigenvalues 0.5 and 0.25 is log 0.5."""
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    matrix = turn @ torch.diag(torch.tensor([0.5, 0.25], dtype=torch.float64)) @ turn.T
    cell = FunctionCell(lambda state, x: state @ matrix.T + x, 2)
    inputs = torch.randn(1, 400, 2, generator=torch.Generator().manual_seed(0)).double()
    states = solve(cell, inputs, None, "sequential").states
    assert abs(lyapunov(cell, inputs, states) - math.log(0.5)) < 0.01


def test_cells_expand_and_contract():
    inputs = torch.randn(1, 300, 16, generator=torch.Generator().manual_seed(0)).double()
    exponents = []
    for gain in (0.5, 1.0, 3.0):
        cell = expanding(gain, 16)
        exponents.append(lyapunov(cell, inputs, solve(cell, inputs, None, "sequential").states))
    assert exponents == sorted(exponents) and exponents[0] < -0.3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cells": ["rnn"]}, "cells"),
        ({"methods": ["newton"]}, "methods"),
        ({"lengths": [0]}, r"--lengths \(=\[0\]\) must have whole numbers from 1 on"),
        ({"trust_region": -1}, r"trust_region \(=-1\) must be 'auto', or a finite number > 0"),
        ({"widths": []}, r"--widths \(=\[\]\) must have whole numbers from 1 on"),
    ],
)
def test_what_is_no_option(given, message):
    with pytest.raises(UserError, match=message):
        report(**given)


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_has_inputs(name, capsys):
    report(cells=[name], methods=["auto"], lengths=[9], widths=[3], repeats=1)
    assert name in capsys.readouterr().out
