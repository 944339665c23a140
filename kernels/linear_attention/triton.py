"""Linear attention on GPUs: the host side of the Triton kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels.decay import d_log_decay, sums_in_chunks
from supra.kernels.launch import (
    ALL_CHANNELS,
    Table,
    Tiling,
    blocks,
    common_dtype,
    launch,
    operands,
    precision,
    sequences,
    storage_dtype,
    strides,
    tiling,
)
from supra.kernels.linear_attention import triton_backward, triton_backward_states, triton_forward

# A state is kept every CHUNK tokens, in tiles of TILE: halving CHUNK would add a quarter to the
# bytes of the forward pass, doubling it gains 15 % on an H100 and nothing on an A100.
CHUNK, TILE = 128, 64

# Nothing spills with these in bf16: where SQUARE would by 8 bytes, other stages or warps do not
SQUARE, DEEP = Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3)
SLIM, BROAD = Tiling(32, 32, 2, 2), Tiling(64, 64, 8, 2)

# In float32 SQUARE takes up to 97 KiB of shared memory and spills 7 KB on sm_80. These take 48 KiB
# and spill at most 80 bytes: what a program keeps is wide, what it sums over is not
FINE = {f"{target} float32": ((256, Tiling(32, 32, 4, 1)),) for target in ("sm_80", "small")}
BY_KEY = {"any float32": ((256, Tiling(64, 32, 4, 1)),), **FINE}
BY_VALUE = {"any float32": ((256, Tiling(32, 64, 4, 1)),), **FINE}

TILINGS: Table = {
    "chunk_states": {
        "any": ((32, SLIM), (256, SQUARE)), "sm_90": ((256, SQUARE),),
        "sm_100": ((64, SQUARE), (128, DEEP), (256, SQUARE)), **BY_KEY,
    },
    "chunk_output": {"any": ((256, SQUARE),), "sm_100": ((128, SQUARE), (256, DEEP)), **BY_VALUE},
    "chunk_d_states": {
        "any": ((256, SQUARE),), "sm_100": ((32, SQUARE), (64, BROAD), (256, SQUARE)), **BY_KEY
    },
    "chunk_d_query": {"any": ((256, SQUARE),), **BY_KEY},
    "chunk_d_key": {"any": ((256, SQUARE),), **BY_KEY},
    "chunk_d_value": {"any": ((256, SQUARE),), **BY_VALUE},
    "output_factors": {"any": ((256, Tiling(16, 64, 4, 2)),)},
    "recurrent_steps": {"any": ((256, Tiling(ALL_CHANNELS, 16, 4, 1)),)},
}  # fmt: skip


def chunk_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    normalized: bool,
    scale: float,
    eps: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Arguments and results are those of operator.forward; the kernels choose their chunks."""
    plan = _Plan(query, key, value, log_decay, cu_seqlens, normalized)
    end, end_z = plan.empty_state()
    states, normalizers = _states(plan, memory, normalizer, end, end_z)
    output = plan.query.new_empty(*query.shape[:3], plan.value_width)
    weights = query.new_empty(query.shape[:3], dtype=torch.float32) if normalized else None
    plan.launch(
        triton_forward.chunk_output, plan.by_value("chunk_output", plan.heads),
        states=states, normalizers=normalizers, output=output, weights=weights,
        heads=plan.heads, scale=scale, eps=eps,
    )  # fmt: skip
    end, end_z = plan.unpad(end, end_z)
    return output[..., : value.shape[3]].to(value.dtype), end, end_z, weights


def chunk_backward(
    d_output: Tensor,
    d_memory: Tensor | None,
    d_normalizer: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    output: Tensor,
    weights: Tensor,
    *,
    normalized: bool,
    scale: float,
    eps: float,
    chunk_size: int,
) -> tuple[Tensor | None, ...]:
    """Arguments and results are those of operator.backward; the states are computed again."""
    plan = _Plan(query, key, value, log_decay, cu_seqlens, normalized)
    (d_output,) = operands(d_output.to(plan.query.dtype))
    plan.given |= {"d_output": d_output, **strides("d", d_output), "scale": scale}
    plan.given["factors"] = _factors(plan, output, weights, eps) if normalized else None
    states, normalizers = _states(plan, memory, normalizer)
    d_states, d_normalizers, carried, d_memory, d_normalizer = _d_states(
        plan, states, normalizers, d_memory, d_normalizer, memory is not None
    )

    d_value = plan.value.new_empty(*value.shape[:3], plan.value_width)
    plan.launch(
        triton_backward.chunk_d_value, plan.by_value("chunk_d_value", plan.kv_heads),
        d_states=d_states, d_value=d_value, heads=plan.kv_heads,
    )  # fmt: skip
    d_query = plan.query.new_empty(*query.shape[:3], plan.key_width)
    query_products = plan.products("chunk_d_query", plan.heads)
    plan.launch(
        triton_backward.chunk_d_query, plan.by_key("chunk_d_query", plan.heads),
        states=states, normalizers=normalizers, d_query=d_query, query_products=query_products,
        heads=plan.heads,
    )  # fmt: skip
    d_key = plan.key.new_empty(*key.shape[:3], plan.key_width)
    key_products = plan.products("chunk_d_key", plan.state_heads)
    plan.launch(
        triton_backward.chunk_d_key, plan.by_key("chunk_d_key", plan.kv_heads),
        d_states=d_states, d_normalizers=d_normalizers, d_key=d_key, key_products=key_products,
        heads=plan.kv_heads,
    )  # fmt: skip

    gradient = None
    if log_decay is not None:
        gradient = d_log_decay(
            log_decay, plan.given, query_products, key_products=key_products, carried=carried
        )
    d_memory, d_normalizer = plan.unpad(d_memory, d_normalizer)
    return (
        d_query[..., : query.shape[3]].to(query.dtype),
        d_key[..., : query.shape[3]].to(key.dtype),
        d_value[..., : value.shape[3]].to(value.dtype),
        gradient,
        d_memory,
        d_normalizer,
    )


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    memory: Tensor,
    normalizer: Tensor | None,
    *,
    scale: float,
    eps: float,
) -> Tensor:
    """Output of the recurrence token by token; memory and normalizer are updated in place."""
    batch, length, heads, key_width = query.shape
    value_width, state_heads, output_dtype = value.shape[3], memory.shape[1], value.dtype
    dtype = storage_dtype(common_dtype(query, key, value))
    query, key, value = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (x.to(dtype) for x in (query, key, value))
    )
    output = value.new_empty(batch, length, heads, value_width)
    end = None if normalizer is None else torch.empty_like(normalizer)
    cut = tiling(TILINGS, "recurrent_steps", key_width, value_width, query.device)
    decay_strides = dict.fromkeys(("decay_batch", "decay_time", "decay_head"), 0)
    if log_decay is not None:
        by_token = log_decay if log_decay.dim() == 3 else log_decay.expand(batch, length, -1)
        decay_strides = strides("decay", by_token)
    launch(
        triton_forward.recurrent_steps,
        (batch * state_heads * blocks(value_width, cut.value),),
        {
            "query": query, "key": key, "value": value, "log_decay": log_decay,
            "memory": memory, "normalizer": normalizer, "end_normalizer": end, "output": output,
            **strides("query", query), **strides("key", key), **strides("value", value),
            **decay_strides, "length": length, "heads": state_heads, "scale": scale, "eps": eps,
        },
        cut,
        KEY_WIDTH=key_width, VALUE_WIDTH=value_width, BLOCK_K=cut.key, BLOCK_V=cut.value,
        QUERIES=heads // state_heads, STATES=state_heads // key.shape[2],
        HAS_DECAY=log_decay is not None, NORMALIZED=normalizer is not None,
    )  # fmt: skip
    if normalizer is not None:
        normalizer.copy_(end)
    return output.to(output_dtype)


class _Plan:
    """What all launches of one call share: operands, sizes, sequences and decay sums."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None,
        cu_seqlens: Tensor | None,
        normalized: bool,
    ):
        self.widths = query.shape[3], value.shape[3]
        self.query, self.key, self.value = operands(query, key, value)
        self.precision = precision(query, key, value)
        self.decayed, self.normalized = log_decay is not None, normalized
        self.batch, self.length, self.heads, self.key_width = self.query.shape
        self.kv_heads, self.value_width = self.value.shape[2:]
        self.state_heads = log_decay.shape[-1] if self.decayed else self.kv_heads
        self.total = self.batch * self.length
        found, self.chunks = sequences(self.query, cu_seqlens, CHUNK)
        self.count = found["sequences"]
        sums = {"sums": None, "sums_batch": 0, "sums_time": 0, "sums_head": 0}
        if self.decayed:
            sums = sums_in_chunks(log_decay, CHUNK, self.chunks, found)
        self.given: dict[str, Any] = {
            "query": self.query, "key": self.key, "value": self.value,
            **strides("query", self.query), **strides("key", self.key),
            **strides("value", self.value), **found, **sums,
            "total": self.total, "chunks": self.chunks,
            "KEY_WIDTH": self.key_width, "VALUE_WIDTH": self.value_width,
            "CHUNK": CHUNK, "TILE": TILE, "QUERIES": self.heads // self.state_heads,
            "STATES": self.state_heads // self.kv_heads, "HAS_DECAY": self.decayed,
            "NORMALIZED": normalized, "PRECISION": self.precision,
        }  # fmt: skip

    def launch(self, kernel: Any, grid: tuple[int, ...], **own: Any) -> None:
        """Launch with the shared arguments, its row of the table, and its own arguments."""
        cut = self.tiling(kernel.__name__)
        launch(kernel, grid, self.given, cut, BLOCK_K=cut.key, BLOCK_V=cut.value, **own)

    def tiling(self, kernel: str) -> Tiling:
        return tiling(
            TILINGS, kernel, self.key_width, self.value_width, self.query.device, self.precision
        )

    def blocks(self, kernel: str) -> tuple[int, int]:
        """Blocks of key and of value channels."""
        cut = self.tiling(kernel)
        return blocks(self.key_width, cut.key), blocks(self.value_width, cut.value)

    def by_key(self, kernel: str, heads: int) -> tuple[int, int]:
        """Grid with a program for every tile of tokens and block of key channels."""
        return self.chunks * (CHUNK // TILE) * self.blocks(kernel)[0], heads

    def by_value(self, kernel: str, heads: int) -> tuple[int, int]:
        return self.chunks * (CHUNK // TILE) * self.blocks(kernel)[1], heads

    def by_state(self, kernel: str) -> tuple[int]:
        key, value = self.blocks(kernel)
        return (self.count * self.state_heads * key * value,)

    def empty_state(self) -> tuple[Tensor, Tensor | None]:
        shape = (self.count, self.state_heads, self.key_width, self.value_width)
        memory = self.query.new_empty(shape, dtype=torch.float32)
        return memory, memory.new_empty(shape[:3]) if self.normalized else None

    def pad(self, memory: Tensor | None, normalizer: Tensor | None):
        """A state as wide as the operands."""
        key, value = self.key_width - self.widths[0], self.value_width - self.widths[1]
        if memory is not None:
            memory = F.pad(memory, (0, value, 0, key)) if key or value else memory.contiguous()
        if normalizer is not None:
            normalizer = F.pad(normalizer, (0, key)) if key else normalizer.contiguous()
        return memory, normalizer

    def unpad(self, memory: Tensor | None, normalizer: Tensor | None):
        key, value = self.widths
        if memory is not None:
            memory = memory[:, :, :key, :value].contiguous()
        if normalizer is not None:
            normalizer = normalizer[..., :key].contiguous()
        return memory, normalizer

    def slots(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Room for `count` states per head, and for as many normalizers."""
        shape = (count, self.state_heads, self.key_width, self.value_width)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        normalizers = None
        if self.normalized:
            normalizers = self.query.new_empty(shape[:3], dtype=torch.float32)
        return self.query.new_empty(shape, dtype=dtype), normalizers

    def products(self, kernel: str, heads: int) -> Tensor | None:
        """Room for a number per token, head and block of key channels."""
        if not self.decayed:
            return None
        return self.query.new_empty(self.blocks(kernel)[0], heads, self.total, dtype=torch.float32)


def _states(
    plan: _Plan,
    memory: Tensor | None,
    normalizer: Tensor | None,
    end: Tensor | None = None,
    end_normalizer: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    memory, normalizer = plan.pad(memory, normalizer)
    states, normalizers = plan.slots(plan.chunks + plan.count)
    plan.launch(
        triton_forward.chunk_states, plan.by_state("chunk_states"),
        memory=memory, normalizer=normalizer, states=states, normalizers=normalizers,
        end_memory=end, end_normalizer=end_normalizer, heads=plan.state_heads,
        HAS_INITIAL=memory is not None, HAS_END=end is not None,
    )  # fmt: skip
    return states, normalizers


def _factors(plan: _Plan, output: Tensor, weights: Tensor, eps: float) -> Tensor:
    factors = plan.query.new_empty(plan.heads, plan.total, 2, dtype=torch.float32)
    (output,) = operands(output.to(plan.query.dtype))
    plan.launch(
        triton_backward_states.output_factors, (blocks(plan.total, TILE), plan.heads),
        output=output.contiguous(), weights=weights.contiguous(), factors=factors,
        heads=plan.heads, eps=eps,
    )  # fmt: skip
    return factors


def _d_states(
    plan: _Plan,
    states: Tensor,
    normalizers: Tensor | None,
    d_end: Tensor | None,
    d_end_normalizer: Tensor | None,
    has_initial: bool,
) -> tuple[Tensor | None, ...]:
    """d_states, d_normalizers, carried, and the gradients of the initial memory and normalizer."""
    d_end, d_end_normalizer = plan.pad(d_end, d_end_normalizer)
    d_memory, d_normalizer = plan.empty_state() if has_initial else (None, None)
    d_states, d_normalizers = plan.slots(plan.chunks)
    carried = None
    if plan.decayed:
        key, value = plan.blocks("chunk_d_states")
        shape = (key * value, plan.state_heads, plan.chunks)
        carried = plan.query.new_empty(shape, dtype=torch.float32)
    plan.launch(
        triton_backward_states.chunk_d_states, plan.by_state("chunk_d_states"),
        states=states, normalizers=normalizers, d_end_memory=d_end,
        d_end_normalizer=d_end_normalizer, d_states=d_states, d_normalizers=d_normalizers,
        carried=carried, d_memory=d_memory, d_normalizer=d_normalizer, heads=plan.state_heads,
        HAS_END=d_end is not None, HAS_END_NORMALIZER=d_end_normalizer is not None,
        HAS_INITIAL=has_initial,
    )  # fmt: skip
    return d_states, d_normalizers, carried, d_memory, d_normalizer
