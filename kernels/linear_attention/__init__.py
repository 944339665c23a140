"""Causal linear attention with scalar decay: chunked for training, recurrent for decoding."""

from supra.kernels.linear_attention.api import (
    LinearAttentionState,
    chunk_linear_attention,
    recurrent_linear_attention,
)

__all__ = ["LinearAttentionState", "chunk_linear_attention", "recurrent_linear_attention"]
