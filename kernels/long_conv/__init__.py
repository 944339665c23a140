"""Causal convolution with a long kernel, that of a state-space model."""

from supra.kernels.long_conv.api import chunk_ssm_conv, recurrent_ssm_conv

__all__ = ["chunk_ssm_conv", "recurrent_ssm_conv"]
