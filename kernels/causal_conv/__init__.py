"""Short causal depthwise convolution: whole sequences, and one token for decoding."""

from supra.kernels.causal_conv.api import causal_conv, causal_conv_step

__all__ = ["causal_conv", "causal_conv_step"]
