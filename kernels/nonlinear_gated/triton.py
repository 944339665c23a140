"""GPUs: the chunked and the recurrent form as Triton kernels, host side.

A program takes a block of the state through all tokens of a sequence, CHUNK at a time. A GPU is
filled by B * H * K * V / (tile) programs; what their blocks of keys or of values add to a result is
written by each and added up by torch, so that nothing depends on which comes first.
"""

from torch import Tensor

from supra.kernels.launch import Rows, Table, Tiling
from supra.kernels.nonlinear_gated import triton_backward, triton_forward
from supra.kernels.nonlinear_gated.inputs import Inputs
from supra.kernels.plan import HeadsPlan, narrow, narrow_heads, recurrent_steps

# 16 to 32 numbers of a tile are a thread's; the backward pass has more tiles alive at once
TILINGS: Table = {
    "chunk_output": {"any": ((32, Tiling(32, 8, 4, 1)), (256, Tiling(64, 4, 4, 1)))},
    "chunk_gradients": {
        "any": ((256, Tiling(16, 16, 8, 1)),),
        "sm_100": ((256, Tiling(16, 8, 4, 1)),),
    },
}


def forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final state, kept states, and how the chunks were solved."""
    plan, kernel = _Plan(x), triton_forward.chunk_output
    grid, (parts, _) = plan.by_state(kernel), plan.blocks(kernel)
    end = plan.new_state()
    states = end.new_empty(plan.chunks if x.save_states else 0, *end.shape[1:])
    if x.cu_seqlens is not None:  # some of these are spare
        states.zero_()
    wide = plan.weight if parts > 1 else plan.query  # what is added up is float32
    output = wide.new_empty(parts, *x.query.shape[:3], plan.value_width)
    solved = plan.new_sums(2, plan.count, plan.heads, grid[0] // (plan.count * plan.heads))
    plan.launch(
        kernel, grid, state=plan.pad(x.state), output=output, states=states, end_state=end,
        solved=solved, output_block=output.stride(0),
        SAVE_STATES=x.save_states,
    )  # fmt: skip
    output = output.sum(0) if parts > 1 else output[0]
    return narrow(output, x.value), plan.unpad(end), states, solved.amax(-1)


def backward(
    x: Inputs, d_output: Tensor, d_end: Tensor | None, states: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors, from the states before every chunk."""
    plan, kernel, tokens = _Plan(x), triton_backward.chunk_gradients, x.query.shape[:3]
    plan.add_d_output(d_output)
    by_key, by_value = plan.blocks(kernel)
    d_query, d_key = (plan.new_sums(by_value, *tokens, plan.key_width) for _ in range(2))
    d_value = plan.new_sums(by_key, *tokens, plan.value_width)
    d_log_decay = plan.new_sums(by_key * by_value, *tokens)
    d_weight, d_state = plan.new_state(), None if x.state is None else plan.new_state()
    plan.launch(
        kernel, plan.by_state(kernel), states=states, d_end=plan.pad(d_end), d_query=d_query,
        d_key=d_key, d_value=d_value, d_log_decay=d_log_decay, d_weight=d_weight, d_state=d_state,
        key_block=d_key.stride(0), value_block=d_value.stride(0),
        decay_block=d_log_decay.stride(0),
    )  # fmt: skip
    return (
        *narrow_heads(x, d_query.sum(0), d_key.sum(0), d_value.sum(0)),
        d_log_decay.sum(0).to(x.log_decay.dtype),
        plan.unpad(d_weight).sum(0).to(x.weight.dtype),
        plan.unpad(d_state),
    )


def recurrent(x: Inputs) -> Tensor:
    """Output of the recurrence token by token; the state is updated in place."""
    return recurrent_steps(
        triton_forward.recurrent_steps, x, x.query.shape[2],
        log_decay=Rows.of(x.log_decay),
        weight=x.weight.float().contiguous(), state=x.state,
    )  # fmt: skip


class _Plan(HeadsPlan):
    """With the decays and the weight of the state, and how the chunks are solved."""

    def __init__(self, x: Inputs):
        super().__init__(TILINGS, x, x.chunk_size, state_heads=x.query.shape[2])
        self.weight = self.pad(x.weight.float())
        self.given |= {
            "weight": self.weight, "log_decay": Rows.of(x.log_decay),
            "sweeps": x.sweeps, "tolerance": x.tolerance,
        }  # fmt: skip
