"""Causal linear attention with a decay per key channel: GLA and RWKV-6."""

from supra.kernels.gated_linear_attention.api import (
    chunk_gated_linear_attention,
    recurrent_gated_linear_attention,
)

__all__ = ["chunk_gated_linear_attention", "recurrent_gated_linear_attention"]
