"""GPUs: the chunked and the recurrent form as Triton kernels, host side.

A program takes a block of the state through all tokens of a sequence, CHUNK at a time. A GPU is
filled by B * H * K * V / (tile) programs; what their blocks of keys or of values add to a result is
written by each and added up by torch, so that nothing depends on which comes first.
"""

import torch.nn.functional as F
from torch import Tensor

from supra.kernels.launch import (
    ALL_CHANNELS,
    Table,
    Tiling,
    blocks,
    common_dtype,
    launch,
    operands,
    sequences,
    storage_dtype,
    strides,
    tiling,
)
from supra.kernels.nonlinear_gated import triton_backward, triton_forward

# 16 to 32 numbers of a tile are a thread's; the backward pass has more tiles alive at once
TILINGS: Table = {
    "chunk_output": {"any": ((32, Tiling(32, 8, 4, 1)), (256, Tiling(64, 4, 4, 1)))},
    "chunk_gradients": {
        "any": ((256, Tiling(16, 16, 8, 1)),),
        "sm_100": ((256, Tiling(16, 8, 4, 1)),),
    },
    "recurrent_steps": {"any": ((256, Tiling(ALL_CHANNELS, 16, 4, 1)),)},
}


def chunk_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    sweeps: int,
    tolerance: float,
    chunk_size: int,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results are those of operator.forward."""
    plan = _Plan(query, key, value, log_decay, weight, cu_seqlens, chunk_size)
    cut = plan.tiling("chunk_output")
    parts = blocks(plan.key_width, cut.key)
    count = plan.programs(cut)
    end = plan.empty_states(plan.count)
    states = plan.empty_states(plan.chunks if save_states else 0)
    if plan.packed:  # of which some are spare
        states.zero_()
    wide = plan.weight if parts > 1 else plan.query  # what is added up is float32
    output = wide.new_empty(parts, *query.shape[:3], plan.value_width)
    solved = plan.weight.new_empty(2, plan.count, plan.heads, count // plan.lanes)
    launch(
        triton_forward.chunk_output,
        (count,),
        {
            **plan.shared, "state": plan.pad(state), "output": output, "states": states,
            "end_state": end, "solved": solved, "output_block": output.stride(0), "scale": scale,
            "sweeps": sweeps, "tolerance": tolerance,
        },
        cut,
        **plan.constants(cut), HAS_INITIAL=state is not None, SAVE_STATES=save_states,
    )  # fmt: skip
    output = (output.sum(0) if parts > 1 else output[0])[..., : value.shape[3]]
    return output.to(value.dtype), plan.unpad(end), states, solved.amax(-1)


def chunk_backward(
    d_output: Tensor,
    d_end: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    *,
    scale: float,
    sweeps: int,
    tolerance: float,
    chunk_size: int,
) -> tuple[Tensor | None, ...]:
    """Arguments and results are those of operator.backward."""
    plan = _Plan(query, key, value, log_decay, weight, cu_seqlens, chunk_size)
    (d_output,) = operands(d_output.to(plan.query.dtype))
    cut = plan.tiling("chunk_gradients")
    parts_k, parts_v = blocks(plan.key_width, cut.key), blocks(plan.value_width, cut.value)
    d_query = plan.weight.new_empty(parts_v, *query.shape[:3], plan.key_width)
    d_key = d_query.new_empty(d_query.shape)
    d_value = d_query.new_empty(parts_k, *query.shape[:3], plan.value_width)
    d_log_decay = d_query.new_empty(parts_k * parts_v, *query.shape[:3])
    d_weight = plan.empty_states(plan.count)
    d_state = plan.empty_states(plan.count) if state is not None else None
    launch(
        triton_backward.chunk_gradients,
        (plan.programs(cut),),
        {
            **plan.shared, **strides("d", d_output), "states": states, "d_output": d_output,
            "d_end": plan.pad(d_end), "d_query": d_query, "d_key": d_key, "d_value": d_value,
            "d_log_decay": d_log_decay, "d_weight": d_weight, "d_state": d_state,
            "key_block": d_key.stride(0), "value_block": d_value.stride(0),
            "decay_block": d_log_decay.stride(0), "scale": scale, "sweeps": sweeps,
            "tolerance": tolerance,
        },
        cut,
        **plan.constants(cut), HAS_END=d_end is not None, HAS_INITIAL=state is not None,
    )  # fmt: skip
    return (
        d_query.sum(0)[..., : query.shape[3]].to(query.dtype),
        d_key.sum(0)[..., : key.shape[3]].to(key.dtype),
        d_value.sum(0)[..., : value.shape[3]].to(value.dtype),
        d_log_decay.sum(0).to(log_decay.dtype),
        plan.unpad(d_weight).sum(0).to(weight.dtype),
        None if state is None else plan.unpad(d_state).to(state.dtype),
    )


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Output of the recurrence token by token; the state is updated in place."""
    batch, length, heads, key_width = query.shape
    value_width, output_dtype = value.shape[3], value.dtype
    dtype = storage_dtype(common_dtype(query, key, value))
    query, key, value = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (query.to(dtype), key.to(dtype), value.to(dtype))
    )
    output = value.new_empty(batch, length, heads, value_width)
    cut = tiling(TILINGS, "recurrent_steps", key_width, value_width, query.device)
    launch(
        triton_forward.recurrent_steps,
        (batch * heads * blocks(value_width, cut.value),),
        {
            "query": query, "key": key, "value": value, "log_decay": log_decay,
            "weight": weight.float().contiguous(), "state": state, "output": output,
            **strides("query", query), **strides("key", key), **strides("value", value),
            **strides("decay", log_decay), "length": length, "heads": heads, "scale": scale,
        },
        cut,
        KEY_WIDTH=key_width, VALUE_WIDTH=value_width, BLOCK_K=cut.key, BLOCK_V=cut.value,
    )  # fmt: skip
    return output.to(output_dtype)


class _Plan:
    """What the launches of one call share: operands, sizes, sequences."""

    def __init__(self, query, key, value, log_decay, weight, cu_seqlens, chunk_size):
        self.given = query.shape[3], value.shape[3]
        self.query, key, value = operands(query, key, value)
        self.heads, self.key_width = self.query.shape[2:]
        self.value_width, self.chunk_size = value.shape[3], chunk_size
        self.weight = self.pad(weight)
        found, self.chunks = sequences(self.query, cu_seqlens, chunk_size)
        self.count = found["sequences"]
        self.lanes = self.count * self.heads
        self.packed = found.pop("PACKED")
        self.shared = {
            "query": self.query, "key": key, "value": value, "log_decay": log_decay,
            "weight": self.weight, **found, **strides("query", self.query), **strides("key", key),
            **strides("value", value), **strides("decay", log_decay), "heads": self.heads,
        }  # fmt: skip

    def tiling(self, kernel: str) -> Tiling:
        return tiling(TILINGS, kernel, self.key_width, self.value_width, self.query.device)

    def programs(self, cut: Tiling) -> int:
        return self.lanes * blocks(self.key_width, cut.key) * blocks(self.value_width, cut.value)

    def constants(self, cut: Tiling) -> dict[str, int]:
        return {
            "KEY_WIDTH": self.key_width, "VALUE_WIDTH": self.value_width, "BLOCK_K": cut.key,
            "BLOCK_V": cut.value, "CHUNK": self.chunk_size, "PACKED": self.packed,
        }  # fmt: skip

    def empty_states(self, count: int) -> Tensor:
        return self.weight.new_empty(count, self.heads, self.key_width, self.value_width)

    def pad(self, state: Tensor | None) -> Tensor | None:
        """A state or the weight, in float32 and as wide as the operands."""
        if state is None:
            return None
        key, value = self.key_width - self.given[0], self.value_width - self.given[1]
        return F.pad(state.float(), (0, value, 0, key)).contiguous()

    def unpad(self, state: Tensor) -> Tensor:
        return state[:, :, : self.given[0], : self.given[1]].contiguous()
