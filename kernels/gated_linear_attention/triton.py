"""Gated linear attention on GPUs: the host side of the Triton kernels."""

import torch
from torch import Tensor

from supra.kernels.gated_linear_attention import triton_backward, triton_decay, triton_forward
from supra.kernels.gated_linear_attention.inputs import Inputs
from supra.kernels.launch import ALL_CHANNELS, Table, Tiling, pad_width, strides
from supra.kernels.plan import HeadsPlan, contiguous_rows, narrow, narrow_heads, recurrent_steps

# A chunk is one tile and a state is kept for each: with 128 tokens a chunk the forward pass would
# move 11 % fewer bytes, since the sums of logs weigh more than the states, and score two tiles.
TILE, LEVELS = 64, 6

SQUARE, FLAT = Tiling(64, 64, 4, 2), Tiling(32, 64, 4, 2)
FLOAT32 = {"any float32": ((256, Tiling(32, 32, 4, 2)),)}
FLOAT32_ONE_STAGE = {"any float32": ((256, Tiling(32, 32, 4, 1)),)}

# a target has a row of its own where the kernel would spill with that of "any"
TILINGS: Table = {
    "decay_sums": {"any": ((256, Tiling(64, 64, 4, 1)),)},
    "chunk_states": {
        "any": ((256, SQUARE),),
        "sm_100": ((32, Tiling(32, 32, 4, 2)), (256, Tiling(64, 64, 8, 2))), **FLOAT32,
    },
    "chunk_scores": {"any": ((256, Tiling(64, 64, 4, 1)),), **FLOAT32_ONE_STAGE},
    "chunk_output": {
        "any": ((256, SQUARE),), "sm_100": ((128, SQUARE), (256, Tiling(64, 64, 4, 1))), **FLOAT32,
    },
    "chunk_d_states": {
        "any": ((256, SQUARE),), "sm_100": ((32, Tiling(32, 32, 4, 3)), (256, SQUARE)), **FLOAT32,
    },
    "chunk_d_scores": {"any": ((256, SQUARE),), **FLOAT32},
    "chunk_d_query": {"any": ((256, Tiling(32, 64, 4, 1)),), **FLOAT32_ONE_STAGE},
    "chunk_d_key": {
        "any": ((256, FLAT),), "sm_90": ((256, Tiling(32, 64, 4, 1)),), **FLOAT32_ONE_STAGE,
    },
    "chunk_d_value": {"any": ((256, FLAT),), **FLOAT32},
    "recurrent_steps": {"any": ((256, Tiling(ALL_CHANNELS, 16, 4, 1)),)},
}  # fmt: skip


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and final state; the kernels choose their chunks."""
    plan, kernel = _Plan(x), triton_forward.chunk_output
    end, output = plan.new_state(), plan.new_output()
    plan.launch(
        kernel, plan.by_value(kernel, plan.heads), heads=plan.heads,
        states=_states(plan, x.state, end), scores=_scores(plan), output=output,
    )  # fmt: skip
    return narrow(output, x.value), plan.unpad(end)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; states and scores are computed again."""
    plan = _Plan(x)
    plan.add_d_output(d_output)
    states, scores = _states(plan, x.state), _scores(plan)
    d_states, d_whole, d_start = _d_states(plan, states, d_end, x.state is not None)
    d_scores = torch.empty_like(scores)
    plan.launch(
        triton_backward.chunk_d_scores, (plan.chunks, plan.heads), heads=plan.heads,
        d_scores=d_scores,
    )  # fmt: skip

    d_value, kernel = plan.value.new_empty(plan.value.shape), triton_backward.chunk_d_value
    plan.launch(
        kernel, plan.by_value(kernel, plan.kv_heads),
        scores=scores, d_states=d_states, d_value=d_value,
    )  # fmt: skip
    d_query, kernel = plan.query.new_empty(plan.query.shape), triton_backward.chunk_d_query
    d_logs = torch.empty_like(d_query, dtype=torch.float32)
    d_bonus = None
    if x.bonus is not None:  # zeros: packed rows leave some chunks empty
        d_bonus = d_logs.new_zeros(plan.chunks, plan.heads, plan.key_width)
    plan.launch(
        kernel, plan.by_key(kernel, plan.heads), heads=plan.heads, states=states,
        d_scores=d_scores, d_query=d_query, d_logs=d_logs, d_bonus=d_bonus,
    )  # fmt: skip
    d_key, kernel = plan.key.new_empty(plan.key.shape), triton_backward.chunk_d_key
    d_log_decay = torch.empty_like(d_key, dtype=torch.float32)
    plan.launch(
        kernel, plan.by_key(kernel, plan.kv_heads), d_states=d_states, d_scores=d_scores,
        d_whole=d_whole, d_query_logs=d_logs, d_key=d_key, d_log_decay=d_log_decay,
        value_blocks=len(d_whole),
    )  # fmt: skip
    return (
        *narrow_heads(x, d_query, d_key, d_value),
        narrow(d_log_decay, x.log_decay),
        None if x.bonus is None else narrow(d_bonus.sum(0), x.bonus),
        plan.unpad(d_start),
    )


def recurrent(x: Inputs) -> Tensor:
    """Output of the recurrence token by token; the state is updated in place."""
    log_decay = contiguous_rows(x.log_decay)
    return recurrent_steps(
        triton_forward.recurrent_steps, TILINGS, x, x.key.shape[2],
        log_decay=log_decay, **strides("decay", log_decay), state=x.state,
        bonus=None if x.bonus is None else x.bonus.contiguous(), HAS_BONUS=x.bonus is not None,
    )  # fmt: skip


class _Plan(HeadsPlan):
    """With the sums of the decays in every tile, and the decay of the whole tile."""

    def __init__(self, x: Inputs):
        super().__init__(TILINGS, x, TILE, state_heads=x.key.shape[2])
        log_decay = pad_width(x.log_decay)
        sums = log_decay.new_empty(log_decay.shape, dtype=torch.int32)
        self.whole = self.new_sums(self.chunks, self.kv_heads, self.key_width)
        self.given |= {
            "log_decay": log_decay, **strides("decay", log_decay), "sums": sums,
            "whole": self.whole,
            "bonus": None if x.bonus is None else pad_width(x.bonus.float()).contiguous(),
            "HAS_BONUS": x.bonus is not None, "TILE": TILE, "LEVELS": LEVELS,
        }  # fmt: skip
        kernel = triton_decay.decay_sums
        self.launch(kernel, self.by_key(kernel, self.kv_heads))


def _states(plan: _Plan, start: Tensor | None, end: Tensor | None = None) -> Tensor:
    """The states before every chunk and after the last."""
    states, kernel = plan.new_states(plan.chunks + plan.count), triton_forward.chunk_states
    plan.launch(
        kernel, plan.by_state(kernel), state=plan.pad(start), states=states, end_state=end,
        HAS_INITIAL=start is not None, HAS_END=end is not None,
    )  # fmt: skip
    return states


def _scores(plan: _Plan) -> Tensor:
    scores = plan.new_kept(*plan.query.shape[:3], TILE)
    kernel = triton_forward.chunk_scores
    plan.launch(kernel, (plan.chunks, plan.heads), heads=plan.heads, scores=scores)
    return scores


def _d_states(
    plan: _Plan, states: Tensor, d_end: Tensor | None, has_initial: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the states after the chunks, of their whole decays, of the initial state."""
    kernel, d_states = triton_backward.chunk_d_states, plan.new_states(plan.chunks)
    d_start = plan.new_state() if has_initial else None
    d_whole = plan.new_sums(plan.blocks(kernel)[1], *plan.whole.shape)
    plan.launch(
        kernel, plan.by_state(kernel), states=states, d_end=plan.pad(d_end), d_states=d_states,
        d_whole=d_whole, d_state=d_start, HAS_END=d_end is not None, HAS_INITIAL=has_initial,
    )  # fmt: skip
    return d_states, d_whole, d_start
