"""Causal convolution with a long kernel: that of a state-space model, or any."""

from supra.kernels.long_conv.api import (
    chunk_ssm_conv,
    fft_conv,
    recurrent_ssm_conv,
    ssm_kernel,
    stream_ssm_conv,
)

__all__ = ["chunk_ssm_conv", "fft_conv", "recurrent_ssm_conv", "ssm_kernel", "stream_ssm_conv"]
