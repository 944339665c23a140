"""The gated delta rule on GPUs: the host side of the Triton kernels."""

from torch import Tensor

from supra.kernels import delta_plan
from supra.kernels.decay import d_log_decay
from supra.kernels.delta import Inputs
from supra.kernels.delta_plan import CHUNK, DELTA, FLOAT32, SQUARE
from supra.kernels.gated_delta_rule import triton_backward_keys, triton_kernels
from supra.kernels.launch import Rows, Table, Tiling
from supra.kernels.plan import DecayedPlan, narrow, narrow_heads
from supra.kernels.recurrent import decode

# 64 x 64 wherever that does not spill; one stage where operands of 32 bits fill the shared memory.
LOW, FLAT, TALL = Tiling(32, 64, 4, 2), Tiling(32, 32, 4, 2), Tiling(64, 32, 4, 2)

TILINGS: Table = DELTA | {
    "chunk_inverse": {"any": ((256, SQUARE),), "any float32": FLOAT32},
    "chunk_output": {"any": ((256, SQUARE),), "any float32": FLOAT32},
    "chunk_d_written": {"any": ((256, SQUARE),), "any float32": FLOAT32},
    "chunk_d_overlap": {
        "any": ((256, FLAT),), "sm_90": ((256, LOW),), "any float32": FLOAT32,
    },
    "chunk_d_query": {
        "any": ((256, LOW),), "sm_90": ((256, SQUARE),), "any float32": FLOAT32,
    },
    "chunk_d_key": {
        "any": ((128, LOW), (256, FLAT)), "sm_90": ((256, TALL),), "any float32": FLOAT32,
    },
}  # fmt: skip


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and final state; chunks have CHUNK tokens."""
    plan, kernel = _Plan(x), triton_kernels.chunk_output
    end, output = plan.new_state(), plan.new_output()
    _, _, errors, states = delta_plan.states(plan, plan.key, x.state, end, decayed=plan.decayed)
    plan.launch(
        kernel, plan.by_value(kernel, plan.heads), errors=errors, states=states, output=output
    )
    return narrow(output, x.value), plan.unpad(end)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; T and the states are computed again."""
    plan = _Plan(x)
    plan.add_d_output(d_output)
    inverse, reading, errors, states = delta_plan.states(
        plan, plan.key, x.state, None, decayed=plan.decayed
    )
    d_written, kernel = delta_plan.new_rows(plan, plan.value_width), triton_kernels.chunk_d_written
    plan.launch(kernel, plan.by_value(kernel, plan.kv_heads), d_written=d_written)
    d_states, d_initial = delta_plan.scan_back(plan, reading, d_written, d_end, x.state is not None)
    del reading
    d_value, d_beta = delta_plan.d_values(plan, inverse, errors, d_written)
    del d_written
    key_products = plan.new_products(triton_backward_keys.chunk_d_key, plan.kv_heads)
    plan.launch(
        triton_backward_keys.chunk_d_overlap, (plan.chunks, plan.kv_heads),
        errors=errors, d_value=d_value, d_overlap=inverse, key_products=key_products,
    )  # fmt: skip
    d_query, kernel = plan.query.new_empty(plan.query.shape), triton_backward_keys.chunk_d_query
    query_products = plan.new_products(kernel, plan.heads)
    plan.launch(
        kernel, plan.by_key(kernel, plan.heads),
        errors=errors, states=states, d_query=d_query, query_products=query_products,
    )  # fmt: skip
    d_key, kernel = plan.key.new_empty(plan.key.shape), triton_backward_keys.chunk_d_key
    carried = plan.new_carried(plan.blocks(kernel)[0])
    plan.launch(
        kernel, plan.by_key(kernel, plan.kv_heads),
        errors=errors, states=states, d_states=d_states, d_value=d_value, d_overlap=inverse,
        d_key=d_key, key_products=key_products, carried=carried,
    )  # fmt: skip
    return (
        *narrow_heads(x, d_query, d_key, d_value),
        d_beta.to(x.beta.dtype),
        d_log_decay(plan.log_decay, plan.given, query_products, key_products, carried),
        plan.unpad(d_initial),
    )


def recurrent(x: Inputs) -> Tensor:
    """Output of the recurrence token by token; the state is updated in place."""
    return decode(x, x.key.shape[2], x.state, beta=Rows.of(x.beta))


class _Plan(DecayedPlan):
    """With the strengths of writing."""

    def __init__(self, x: Inputs):
        super().__init__(TILINGS, x, CHUNK, state_heads=x.key.shape[2])
        self.given |= {"beta": Rows.of(x.beta.float()), **delta_plan.PER_HEAD}
