"""Solves nonlinear recurrences over all tokens at once: DEER, quasi-DEER, ELK, quasi-ELK."""

from supra.parallel.cells import (
    GRU,
    LSTM,
    Cell,
    FunctionCell,
    NonlinearGated,
    ParaGRU,
    ParaLSTM,
)
from supra.parallel.solve import METHODS, NotConverged, Solution, solve

__all__ = [
    "GRU",
    "LSTM",
    "METHODS",
    "Cell",
    "FunctionCell",
    "NonlinearGated",
    "NotConverged",
    "ParaGRU",
    "ParaLSTM",
    "Solution",
    "solve",
]
