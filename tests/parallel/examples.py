"""Cells with random inputs in float64."""

import torch

from supra.parallel import GRU, LSTM, FunctionCell, NonlinearGated, ParaGRU, ParaLSTM

NAMES = ("gru", "lstm", "para_gru", "para_lstm", "nonlinear_gated", "function")


def expanding(gain, width=5, seed=0):
    """tanh(h) Wᵀ + x, where W has this spectral radius; above 1 the cell tends to expand."""
    generator = torch.Generator().manual_seed(seed)
    weight = gain * torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    return FunctionCell(lambda state, x: state.tanh() @ weight.to(state).T + x, width)


def example(name, tokens=77, batch=2, seed=0):
    """A cell, its inputs and an initial state; all leaves require a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = torch.randn(batch, tokens, 5)
        cell = {
            "gru": lambda: GRU(5, 6),
            "lstm": lambda: LSTM(5, 4),
            "para_gru": lambda: ParaGRU(5, 6),
            "para_lstm": lambda: ParaLSTM(5, 6),
            "nonlinear_gated": lambda: NonlinearGated(
                torch.nn.Parameter(torch.rand(2, 3, 4) * 1.6 - 0.8)
            ),
            "function": lambda: expanding(0.5),
        }[name]()
        if name == "nonlinear_gated":
            shapes = (batch, tokens, 2, 3), (batch, tokens, 2, 4)
            inputs = (*(torch.randn(shape) for shape in shapes), -torch.rand(batch, tokens, 2))
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        cell, inputs = cell.double(), tuple(x.double().requires_grad_() for x in inputs)
        given = inputs if len(inputs) > 1 else inputs[0]
        state = torch.randn_like(cell.empty_state(cell.project(given))).requires_grad_()
    return cell, given, state, [state, *inputs, *cell.parameters()]
