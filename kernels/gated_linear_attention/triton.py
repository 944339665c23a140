"""Gated linear attention on GPUs: the host side of the Triton kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels.gated_linear_attention import triton_backward, triton_decay, triton_forward
from supra.kernels.launch import (
    ALL_CHANNELS,
    Table,
    Tiling,
    blocks,
    common_dtype,
    launch,
    operands,
    pad_width,
    precision,
    sequences,
    storage_dtype,
    strides,
    tiling,
)

# A chunk is one tile and a state is kept for each: with 128 tokens a chunk the forward pass would
# move 11 % fewer bytes, since the sums of logs weigh more than the states, and score two tiles.
TILE, LEVELS = 64, 6

# a target has a row of its own where the kernel would spill with that of "any"
TILINGS: Table = {
    "decay_sums": {"any": ((256, Tiling(64, 64, 4, 1)),)},
    "chunk_states": {
        "any": ((256, Tiling(64, 64, 4, 2)),),
        "sm_100": ((32, Tiling(32, 32, 4, 2)), (256, Tiling(64, 64, 8, 2))),
        "any float32": ((256, Tiling(32, 32, 4, 2)),),
    },
    "chunk_scores": {
        "any": ((256, Tiling(64, 64, 4, 1)),),
        "any float32": ((256, Tiling(32, 32, 4, 1)),),
    },
    "chunk_output": {
        "any": ((256, Tiling(64, 64, 4, 2)),),
        "sm_100": ((128, Tiling(64, 64, 4, 2)), (256, Tiling(64, 64, 4, 1))),
        "any float32": ((256, Tiling(32, 32, 4, 2)),),
    },
    "chunk_d_states": {
        "any": ((256, Tiling(64, 64, 4, 2)),),
        "sm_100": ((32, Tiling(32, 32, 4, 3)), (256, Tiling(64, 64, 4, 2))),
        "any float32": ((256, Tiling(32, 32, 4, 2)),),
    },
    "chunk_d_scores": {
        "any": ((256, Tiling(64, 64, 4, 2)),),
        "any float32": ((256, Tiling(32, 32, 4, 2)),),
    },
    "chunk_d_query": {
        "any": ((256, Tiling(32, 64, 4, 1)),),
        "any float32": ((256, Tiling(32, 32, 4, 1)),),
    },
    "chunk_d_key": {
        "any": ((256, Tiling(32, 64, 4, 2)),),
        "sm_90": ((256, Tiling(32, 64, 4, 1)),),
        "any float32": ((256, Tiling(32, 32, 4, 1)),),
    },
    "chunk_d_value": {
        "any": ((256, Tiling(32, 64, 4, 2)),),
        "any float32": ((256, Tiling(32, 32, 4, 2)),),
    },
    "recurrent_steps": {"any": ((256, Tiling(ALL_CHANNELS, 16, 4, 1)),)},
}


def chunk_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of operator.forward; the kernels choose their chunks."""
    plan = _Plan(query, key, value, log_decay, bonus, cu_seqlens)
    end = plan.empty_state()
    states, scores = plan.states(state, end), plan.scores()
    output = plan.query.new_empty(*query.shape[:3], plan.value_width)
    cut = plan.tiling("chunk_output")
    launch(
        triton_forward.chunk_output,
        (plan.chunks * blocks(plan.value_width, cut.value), plan.heads),
        {
            "query": plan.query, "value": plan.value, "sums": plan.sums, "scores": scores,
            "states": states, "output": output, **plan.shared, **strides("query", plan.query),
            **strides("value", plan.value), "heads": plan.heads, "scale": scale,
        },
        cut,
        **plan.widths, **plan.constants, BLOCK_K=cut.key, BLOCK_V=cut.value, QUERIES=plan.queries,
        HAS_BONUS=plan.has_bonus,
    )  # fmt: skip
    return output[..., : value.shape[3]].to(value.dtype), plan.unpad(end)


def chunk_backward(
    d_output: Tensor,
    d_end: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor | None, ...]:
    """Arguments and results are those of operator.backward; states and scores are recomputed."""
    plan = _Plan(query, key, value, log_decay, bonus, cu_seqlens)
    (d_output,) = operands(d_output.to(plan.query.dtype))
    tensors = {
        "query": plan.query, "key": plan.key, "value": plan.value, "d": d_output,
    }  # fmt: skip
    by_name = {name: strides(name, x) for name, x in tensors.items()}
    states, scores = plan.states(state), plan.scores()
    d_states, d_whole, d_start = _d_states(plan, states, d_output, d_end, scale, state is not None)

    d_scores = torch.empty_like(scores)
    cut = plan.tiling("chunk_d_scores")
    launch(
        triton_backward.chunk_d_scores,
        (plan.chunks, plan.heads),
        {
            "value": plan.value, "d_output": d_output, "d_scores": d_scores, **plan.shared,
            **by_name["value"], **by_name["d"], "heads": plan.heads, "scale": scale,
        },
        cut,
        VALUE_WIDTH=plan.value_width, **plan.constants, BLOCK_V=cut.value, QUERIES=plan.queries,
    )  # fmt: skip

    d_value = plan.value.new_empty(*value.shape[:3], plan.value_width)
    cut = plan.tiling("chunk_d_value")
    launch(
        triton_backward.chunk_d_value,
        (plan.chunks * blocks(plan.value_width, cut.value), plan.kv_heads),
        {
            "key": plan.key, "d_output": d_output, "sums": plan.sums, "scores": scores,
            "d_states": d_states, "d_value": d_value, **plan.shared, **by_name["key"],
            **by_name["d"], "heads": plan.kv_heads, "scale": scale,
        },
        cut,
        **plan.widths, **plan.constants, BLOCK_K=cut.key, BLOCK_V=cut.value, QUERIES=plan.queries,
    )  # fmt: skip

    d_query = plan.query.new_empty(*query.shape[:3], plan.key_width)
    d_logs = torch.empty_like(d_query, dtype=torch.float32)
    d_bonus = None
    if bonus is not None:  # zeros: packed rows leave some chunks empty
        d_bonus = d_logs.new_zeros(plan.chunks, plan.heads, plan.key_width)
    cut = plan.tiling("chunk_d_query")
    launch(
        triton_backward.chunk_d_query,
        (plan.chunks * blocks(plan.key_width, cut.key), plan.heads),
        {
            "query": plan.query, "key": plan.key, "d_output": d_output, "sums": plan.sums,
            "bonus": plan.bonus, "states": states, "d_scores": d_scores, "d_query": d_query,
            "d_logs": d_logs, "d_bonus": d_bonus, **plan.shared, **by_name["query"],
            **by_name["key"], **by_name["d"], "heads": plan.heads, "scale": scale,
        },
        cut,
        **plan.widths, **plan.constants, BLOCK_K=cut.key, BLOCK_V=cut.value, QUERIES=plan.queries,
        LEVELS=LEVELS, HAS_BONUS=plan.has_bonus,
    )  # fmt: skip

    d_key = plan.key.new_empty(*key.shape[:3], plan.key_width)
    d_log_decay = torch.empty_like(d_key, dtype=torch.float32)
    cut = plan.tiling("chunk_d_key")
    launch(
        triton_backward.chunk_d_key,
        (plan.chunks * blocks(plan.key_width, cut.key), plan.kv_heads),
        {
            "query": plan.query, "key": plan.key, "value": plan.value, "sums": plan.sums,
            "bonus": plan.bonus, "d_states": d_states, "d_scores": d_scores, "d_whole": d_whole,
            "d_query_logs": d_logs, "d_key": d_key, "d_log_decay": d_log_decay, **plan.shared,
            **by_name["query"], **by_name["key"], **by_name["value"], "heads": plan.kv_heads,
            "chunks": plan.chunks, "value_blocks": len(d_whole),
        },
        cut,
        **plan.widths, **plan.constants, BLOCK_K=cut.key, BLOCK_V=cut.value, QUERIES=plan.queries,
        LEVELS=LEVELS, HAS_BONUS=plan.has_bonus,
    )  # fmt: skip

    width = query.shape[3]
    return (
        d_query[..., :width].to(query.dtype),
        d_key[..., :width].to(key.dtype),
        d_value[..., : value.shape[3]].to(value.dtype),
        d_log_decay[..., :width].to(log_decay.dtype),
        None if bonus is None else d_bonus.sum(0)[..., :width].to(bonus.dtype),
        None if state is None else plan.unpad(d_start).to(state.dtype),
    )


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    state: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Output of the recurrence token by token; the state is updated in place."""
    batch, length, heads, key_width = query.shape
    kv_heads, value_width = value.shape[2:]
    output_dtype = value.dtype
    dtype = storage_dtype(common_dtype(query, key, value))
    query, key, value, log_decay = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (query.to(dtype), key.to(dtype), value.to(dtype), log_decay)
    )
    output = value.new_empty(batch, length, heads, value_width)
    cut = tiling(TILINGS, "recurrent_steps", key_width, value_width, query.device)
    launch(
        triton_forward.recurrent_steps,
        (batch * kv_heads * blocks(value_width, cut.value),),
        {
            "query": query, "key": key, "value": value, "log_decay": log_decay,
            "bonus": None if bonus is None else bonus.contiguous(), "state": state,
            "output": output, **strides("query", query), **strides("key", key),
            **strides("value", value), **strides("decay", log_decay), "length": length,
            "heads": kv_heads, "scale": scale,
        },
        cut,
        KEY_WIDTH=key_width, VALUE_WIDTH=value_width, BLOCK_K=cut.key, BLOCK_V=cut.value,
        QUERIES=heads // kv_heads, HAS_BONUS=bonus is not None,
    )  # fmt: skip
    return output.to(output_dtype)


class _Plan:
    """What all launches of one call share: operands, sizes, sequences and sums of logs."""

    def __init__(self, query, key, value, log_decay, bonus, cu_seqlens):
        self.given = query.shape[3], value.shape[3]
        self.query, self.key, self.value = operands(query, key, value)
        self.precision = precision(query, key, value)
        _, self.length, self.heads, self.key_width = self.query.shape
        self.kv_heads, self.value_width = self.value.shape[2:]
        self.queries = self.heads // self.kv_heads
        self.has_bonus = bonus is not None
        self.bonus = pad_width(bonus.float()).contiguous() if self.has_bonus else None
        self.shared, self.chunks = sequences(self.query, cu_seqlens, TILE)
        self.count = self.shared["sequences"]
        self.widths = {"KEY_WIDTH": self.key_width, "VALUE_WIDTH": self.value_width}
        self.constants = {"TILE": TILE, "PRECISION": self.precision}
        self.sums, self.whole = self._decay_sums(pad_width(log_decay))

    def _decay_sums(self, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        sums = log_decay.new_empty(log_decay.shape, dtype=torch.int32)
        shape = (self.chunks, self.kv_heads, self.key_width)
        whole = log_decay.new_empty(shape, dtype=torch.float32)
        cut = self.tiling("decay_sums")
        launch(
            triton_decay.decay_sums,
            (self.chunks * blocks(self.key_width, cut.key), self.kv_heads),
            {
                "log_decay": log_decay, "sums": sums, "whole": whole, **self.shared,
                **strides("decay", log_decay), "heads": self.kv_heads,
            },
            cut,
            KEY_WIDTH=self.key_width, TILE=TILE, BLOCK_K=cut.key,
        )  # fmt: skip
        return sums, whole

    def tiling(self, kernel: str) -> Tiling:
        widths, device = (self.key_width, self.value_width), self.query.device
        return tiling(TILINGS, kernel, *widths, device, self.precision)

    def kept(self, *shape: int) -> Tensor:
        """Room for what kernels pass on in the precision of an operand."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return self.query.new_empty(shape, dtype=dtype)

    def states(self, start: Tensor | None, end: Tensor | None = None) -> Tensor:
        start = None if start is None else self.pad(start)
        slots = self.chunks + self.count
        states = self.kept(slots, self.kv_heads, self.key_width, self.value_width)
        cut = self.tiling("chunk_states")
        count = blocks(self.key_width, cut.key) * blocks(self.value_width, cut.value)
        launch(
            triton_forward.chunk_states,
            (self.count * self.kv_heads * count,),
            {
                "key": self.key, "value": self.value, "sums": self.sums, "whole": self.whole,
                "state": start, "states": states, "end_state": end, **self.shared,
                **strides("key", self.key), **strides("value", self.value),
                "heads": self.kv_heads,
            },
            cut,
            **self.widths, **self.constants, BLOCK_K=cut.key, BLOCK_V=cut.value,
            HAS_INITIAL=start is not None, HAS_END=end is not None,
        )  # fmt: skip
        return states

    def scores(self) -> Tensor:
        scores = self.kept(*self.query.shape[:3], TILE)
        cut = self.tiling("chunk_scores")
        launch(
            triton_forward.chunk_scores,
            (self.chunks, self.heads),
            {
                "query": self.query, "key": self.key, "sums": self.sums, "bonus": self.bonus,
                "scores": scores, **self.shared, **strides("query", self.query),
                **strides("key", self.key), "heads": self.heads,
            },
            cut,
            KEY_WIDTH=self.key_width, **self.constants, BLOCK_K=cut.key, QUERIES=self.queries,
            LEVELS=LEVELS, HAS_BONUS=self.has_bonus,
        )  # fmt: skip
        return scores

    def empty_state(self) -> Tensor:
        shape = (self.count, self.kv_heads, self.key_width, self.value_width)
        return self.query.new_empty(shape, dtype=torch.float32)

    def pad(self, state: Tensor) -> Tensor:
        """A state as wide as the operands."""
        key, value = self.key_width - self.given[0], self.value_width - self.given[1]
        return F.pad(state.float(), (0, value, 0, key)).contiguous()

    def unpad(self, state: Tensor) -> Tensor:
        return state[:, :, : self.given[0], : self.given[1]].contiguous()


def _d_states(
    plan: _Plan,
    states: Tensor,
    d_output: Tensor,
    d_end: Tensor | None,
    scale: float,
    has_initial: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the states after the chunks, of their whole decays, of the initial state."""
    d_end = None if d_end is None else plan.pad(d_end)
    d_states = plan.kept(plan.chunks, *states.shape[1:])
    d_start = plan.empty_state() if has_initial else None
    cut = plan.tiling("chunk_d_states")
    value_blocks = blocks(plan.value_width, cut.value)
    d_whole = plan.whole.new_empty(value_blocks, *plan.whole.shape)
    launch(
        triton_backward.chunk_d_states,
        (plan.count * plan.kv_heads * blocks(plan.key_width, cut.key) * value_blocks,),
        {
            "query": plan.query, "d_output": d_output, "sums": plan.sums, "whole": plan.whole,
            "states": states, "d_end": d_end, "d_states": d_states, "d_whole": d_whole,
            "d_state": d_start, **plan.shared, **strides("query", plan.query),
            **strides("d", d_output), "heads": plan.kv_heads, "chunks": plan.chunks,
            "scale": scale,
        },
        cut,
        **plan.widths, **plan.constants, BLOCK_K=cut.key, BLOCK_V=cut.value, QUERIES=plan.queries,
        HAS_BONUS=plan.has_bonus, HAS_END=d_end is not None, HAS_INITIAL=has_initial,
    )  # fmt: skip
    return d_states, d_whole, d_start
