"""What `supra bench kernels` compares: supra's operations, and what one would use instead.

Each operation has a file, with its inputs, supra's way to compute it, and its rivals.
"""

from supra.bench.rivals.causal_conv import CAUSAL_CONV
from supra.bench.rivals.contender import Contender, Operation, Setting
from supra.bench.rivals.gated_delta_rule import GATED_DELTA_RULE
from supra.bench.rivals.gated_linear_attention import GATED_LINEAR_ATTENTION
from supra.bench.rivals.kda import KDA
from supra.bench.rivals.linear_attention import LINEAR_ATTENTION
from supra.bench.rivals.long_conv import LONG_CONV
from supra.bench.rivals.mamba2 import MAMBA2
from supra.bench.rivals.nonlinear_gated import NONLINEAR_GATED

__all__ = ["OPERATIONS", "Contender", "Operation", "Setting"]

OPERATIONS: dict[str, Operation] = {
    "linear_attention": LINEAR_ATTENTION,
    "mamba2": MAMBA2,
    "gated_linear_attention": GATED_LINEAR_ATTENTION,
    "gated_delta_rule": GATED_DELTA_RULE,
    "kda": KDA,
    "causal_conv": CAUSAL_CONV,
    "long_conv": LONG_CONV,
    "nonlinear_gated": NONLINEAR_GATED,
}
