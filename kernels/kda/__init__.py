"""Kimi Delta Attention: chunked for training, recurrent for decoding."""

from supra.kernels.kda.api import chunk_kda, recurrent_kda

__all__ = ["chunk_kda", "recurrent_kda"]
