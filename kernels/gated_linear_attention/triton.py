"""Gated linear attention on GPUs: the host side of the Triton kernels."""

from torch import Tensor

from supra.kernels.channel_plan import CHANNELS, FLOAT32, SQUARE, ChannelPlan
from supra.kernels.channel_scores import chunk_output
from supra.kernels.gated_linear_attention import triton_kernels
from supra.kernels.gated_linear_attention.inputs import Inputs
from supra.kernels.launch import Table, Tiling
from supra.kernels.plan import narrow, narrow_heads
from supra.kernels.recurrent import decode

# a target has a row of its own where the kernel would spill with that of "any"
TILINGS: Table = CHANNELS | {
    "chunk_states": {
        "any": ((256, SQUARE),),
        "sm_100": ((32, Tiling(32, 32, 4, 2)), (256, Tiling(64, 64, 8, 2))), **FLOAT32,
    },
    "chunk_d_states": {
        "any": ((256, SQUARE),), "sm_100": ((32, Tiling(32, 32, 4, 3)), (256, SQUARE)), **FLOAT32,
    },
    "chunk_d_written": {"any": ((256, Tiling(32, 64, 4, 2)),), **FLOAT32},
}  # fmt: skip


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and final state; the kernels choose their chunks."""
    plan = ChannelPlan(TILINGS, x, x.bonus)
    end, output = plan.new_state(), plan.new_output()
    plan.launch(
        chunk_output, plan.by_value(chunk_output, plan.heads), heads=plan.heads,
        states=_states(plan, x.state, end), scores=plan.scores(), output=output,
    )  # fmt: skip
    return narrow(output, x.value), plan.unpad(end)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; states and scores are computed again."""
    plan = ChannelPlan(TILINGS, x, x.bonus)
    plan.add_d_output(d_output)
    states, scores = _states(plan, x.state), plan.scores()
    kernel, d_states = triton_kernels.chunk_d_states, plan.new_states(plan.chunks)
    d_start = None if x.state is None else plan.new_state()
    d_whole = plan.new_sums(plan.blocks(kernel)[1], *plan.whole.shape)
    plan.launch(
        kernel, plan.by_state(kernel), states=states, d_end=plan.pad(d_end), d_states=d_states,
        d_whole=d_whole, d_state=d_start,
    )  # fmt: skip
    d_scores = plan.d_scores(plan.heads)

    d_value = plan.value.new_empty(plan.value.shape)
    plan.d_written(d_value, scores, d_states)
    d_query, d_bonus = plan.query.new_empty(plan.query.shape), None
    if x.bonus is not None:  # zeros: packed rows leave some chunks empty
        d_bonus = plan.whole.new_zeros(plan.chunks, plan.heads, plan.key_width)
    d_logs = plan.d_query(plan.heads, states, d_scores, d_query, d_bonus=d_bonus)
    d_key, d_log_decay = plan.d_key(d_states, d_scores, d_whole, d_logs)
    return (
        *narrow_heads(x, d_query, d_key, d_value),
        narrow(d_log_decay, x.log_decay),
        None if x.bonus is None else narrow(d_bonus.sum(0), x.bonus),
        plan.unpad(d_start),
    )


def recurrent(x: Inputs) -> Tensor:
    """Output of the recurrence token by token; the state is updated in place."""
    bonus = None if x.bonus is None else x.bonus.contiguous()
    return decode(x, x.key.shape[2], x.state, bonus=bonus)


def _states(plan: ChannelPlan, start: Tensor | None, end: Tensor | None = None) -> Tensor:
    """The states before every chunk and after the last."""
    states, kernel = plan.new_states(plan.chunks + plan.count), triton_kernels.chunk_states
    plan.launch(
        kernel, plan.by_state(kernel), state=plan.pad(start), states=states, end_state=end,
    )  # fmt: skip
    return states
