"""Gated linear attention whose state passes through a tanh at every token."""

from supra.kernels.nonlinear_gated.api import (
    Convergence,
    chunk_nonlinear_gated,
    recurrent_nonlinear_gated,
)

__all__ = ["Convergence", "chunk_nonlinear_gated", "recurrent_nonlinear_gated"]
