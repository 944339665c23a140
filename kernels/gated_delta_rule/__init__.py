"""The gated delta rule: chunked for training, recurrent for decoding."""

from supra.kernels.gated_delta_rule.api import chunk_gated_delta_rule, recurrent_gated_delta_rule

__all__ = ["chunk_gated_delta_rule", "recurrent_gated_delta_rule"]
