"""Linear attention on GPUs: the host side of the Triton kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels.launch import (
    Table,
    Tiling,
    common_dtype,
    launch,
    operands,
    precision,
    storage_dtype,
    tiling,
)
from supra.kernels.linear_attention import triton_backward, triton_forward
from supra.kernels.linear_attention.torch import LOWEST_LOG_DECAY

# A state is kept every CHUNK tokens, in tiles of TILE: halving CHUNK would add a quarter to the
# bytes of the forward pass, doubling it gains 15 % on an H100 and nothing on an A100.
CHUNK, TILE = 128, 64

TILINGS: Table = {
    "chunk_states": {"any": ((256, Tiling(64, 64, 4, 2)),)},
    "chunk_output": {"any": ((256, Tiling(64, 64, 4, 2)),)},
    "chunk_d_states": {"any": ((256, Tiling(64, 64, 4, 2)),)},
    "chunk_d_query": {"any": ((256, Tiling(64, 64, 4, 2)),)},
    "chunk_d_key": {"any": ((256, Tiling(64, 64, 4, 2)),)},
    "chunk_d_value": {"any": ((256, Tiling(64, 64, 4, 2)),)},
    "recurrent_steps": {"any": ((256, Tiling(256, 16, 4, 1)),)},
}


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
    cut = plan.tiling("chunk_output")
    launch(
        triton_forward.chunk_output,
        (plan.chunks * (CHUNK // TILE) * _blocks(plan.value_width, cut.value), plan.heads),
        {
            "query": plan.query, "key": plan.key, "value": plan.value, "sums": plan.sums,
            "states": states, "normalizers": normalizers, "output": output, "weights": weights,
            **plan.sequences, **_strides("query", plan.query), **_strides("key", plan.key),
            **_strides("value", plan.value), **plan.sums_strides, "sequences": plan.count,
            "length": plan.length, "heads": plan.heads, "scale": scale, "eps": eps,
        },
        cut,
        **plan.constants(cut), QUERIES=plan.queries, STATES=plan.states,
    )  # fmt: skip
    output = output[..., : value.shape[3]].to(value.dtype)
    end, end_z = plan.unpad(end, end_z)
    return output, end, end_z, weights


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
    states, normalizers = _states(plan, memory, normalizer)
    factors = _factors(plan, output, d_output, weights, eps) if normalized else None
    shared = {
        "query": plan.query, "d_output": d_output, "sums": plan.sums, "factors": factors,
        **plan.sequences, **_strides("query", plan.query), **_strides("d", d_output),
        **plan.sums_strides, "length": plan.length, "total": plan.total, "scale": scale,
    }  # fmt: skip
    d_states, d_normalizers, carried, d_memory, d_normalizer = _d_states(
        plan, shared, states, normalizers, d_memory, d_normalizer, memory is not None
    )
    shared |= {"key": plan.key, **_strides("key", plan.key), "sequences": plan.count}

    d_value = plan.value.new_empty(*value.shape[:3], plan.value_width)
    cut = plan.tiling("chunk_d_value")
    launch(
        triton_backward.chunk_d_value,
        (plan.chunks * (CHUNK // TILE) * _blocks(plan.value_width, cut.value), plan.kv_heads),
        {**shared, "d_states": d_states, "d_value": d_value, "heads": plan.kv_heads},
        cut,
        **plan.constants(cut), QUERIES=plan.queries, STATES=plan.states,
    )  # fmt: skip

    shared |= {"value": plan.value, **_strides("value", plan.value)}
    cut = plan.tiling("chunk_d_query")
    key_blocks = _blocks(plan.key_width, cut.key)
    d_query = plan.query.new_empty(*query.shape[:3], plan.key_width)
    query_products = plan.products(key_blocks, plan.heads)
    launch(
        triton_backward.chunk_d_query,
        (plan.chunks * (CHUNK // TILE) * key_blocks, plan.heads),
        {
            **shared, "states": states, "normalizers": normalizers, "d_query": d_query,
            "query_products": query_products, "heads": plan.heads,
        },
        cut,
        **plan.constants(cut), QUERIES=plan.queries, STATES=plan.states,
    )  # fmt: skip

    cut = plan.tiling("chunk_d_key")
    assert key_blocks == _blocks(plan.key_width, cut.key), "dq and dk cut the channels alike"
    d_key = plan.key.new_empty(*key.shape[:3], plan.key_width)
    key_products = plan.products(key_blocks, plan.state_heads)
    launch(
        triton_backward.chunk_d_key,
        (plan.chunks * (CHUNK // TILE) * key_blocks, plan.kv_heads),
        {
            **shared, "d_states": d_states, "d_normalizers": d_normalizers, "d_key": d_key,
            "key_products": key_products, "heads": plan.kv_heads,
        },
        cut,
        **plan.constants(cut), QUERIES=plan.queries, STATES=plan.states,
    )  # fmt: skip

    d_log_decay = None
    if log_decay is not None:
        d_log_decay = _d_log_decay(plan, query_products, key_products, carried, log_decay)
    d_memory, d_normalizer = plan.unpad(d_memory, d_normalizer)
    return (
        d_query[..., : query.shape[3]].to(query.dtype),
        d_key[..., : query.shape[3]].to(key.dtype),
        d_value[..., : value.shape[3]].to(value.dtype),
        d_log_decay,
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
    decay_strides = (0, 0, 0) if log_decay is None else (0, 0, *log_decay.stride())[-3:]
    launch(
        triton_forward.recurrent_steps,
        (batch * state_heads * _blocks(value_width, cut.value),),
        {
            "query": query, "key": key, "value": value, "log_decay": log_decay,
            "memory": memory, "normalizer": normalizer,
            "end_memory": memory, "end_normalizer": end, "output": output,
            **_strides("query", query), **_strides("key", key), **_strides("value", value),
            **dict(zip(("decay_batch", "decay_time", "decay_head"), decay_strides, strict=True)),
            "length": length, "heads": state_heads, "scale": scale, "eps": eps,
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

    def __init__(self, query, key, value, log_decay, cu_seqlens, normalized):
        self.widths = query.shape[3], value.shape[3]
        self.precision = precision(query, key, value)
        self.query, self.key, self.value = operands(query, key, value)
        self.normalized = normalized
        batch, self.length, self.heads, self.key_width = self.query.shape
        self.kv_heads, self.value_width = self.value.shape[2:]
        self.state_heads = self.kv_heads if log_decay is None else log_decay.shape[-1]
        self.queries = self.heads // self.state_heads
        self.states = self.state_heads // self.kv_heads
        self.total = batch * self.length
        self.packed = cu_seqlens is not None
        self.count = len(cu_seqlens) - 1 if self.packed else batch
        self.chunks = batch * _blocks(self.length, CHUNK)
        offsets = None
        if self.packed:
            self.chunks = self.length // CHUNK + self.count  # an upper bound, known to the host
            cu_seqlens = cu_seqlens.to(query.device, torch.int32)
            offsets = F.pad((cu_seqlens.diff() + CHUNK - 1) // CHUNK, (1, 0)).cumsum(0)
            offsets = offsets.to(torch.int32)
        self.sequences = {"cu_seqlens": cu_seqlens, "chunk_offsets": offsets}
        self.sums, self.sums_strides = self._decay_sums(log_decay)

    def _decay_sums(self, log_decay: Tensor | None) -> tuple[Tensor | None, dict[str, int]]:
        """Sums since the chunk began, in two parts, of every token or of one chunk for all."""
        names = ("sums_batch", "sums_time", "sums_head", "sums_low")
        if log_decay is None:
            return None, dict.fromkeys(names, 0)
        heads = self.state_heads
        if log_decay.dim() == 1:
            steps = torch.arange(1, CHUNK + 1, dtype=torch.float64, device=log_decay.device)
            exact = log_decay.double().clamp(min=LOWEST_LOG_DECAY)[:, None] * steps
            high = (exact * 256).floor() / 256
            sums = torch.stack((high, exact - high)).float()
            return sums, dict(zip(names, (0, 0, CHUNK, heads * CHUNK), strict=True))
        sums = self.query.new_empty(2, heads, self.total, dtype=torch.float32)
        launch(
            triton_forward.decay_sums,
            (self.chunks, heads),
            {
                "log_decay": log_decay, "sums": sums, **self.sequences,
                **_strides("decay", log_decay), "sequences": self.count, "length": self.length,
                "heads": heads, "total": self.total, "lowest": LOWEST_LOG_DECAY,
            },
            Tiling(1, 1, 4, 1),
            CHUNK=CHUNK, PACKED=self.packed,
        )  # fmt: skip
        return sums, dict(zip(names, (self.length, 1, self.total, heads * self.total), strict=True))

    def tiling(self, kernel: str) -> Tiling:
        return tiling(TILINGS, kernel, self.key_width, self.value_width, self.query.device)

    def constants(self, cut: Tiling) -> dict[str, object]:
        return {
            "KEY_WIDTH": self.key_width, "VALUE_WIDTH": self.value_width, "CHUNK": CHUNK,
            "TILE": TILE, "BLOCK_K": cut.key, "BLOCK_V": cut.value,
            "HAS_DECAY": self.sums is not None, "NORMALIZED": self.normalized,
            "PACKED": self.packed, "PRECISION": self.precision,
        }  # fmt: skip

    def empty_state(self) -> tuple[Tensor, Tensor | None]:
        shape = (self.count, self.state_heads, self.key_width, self.value_width)
        memory = self.query.new_empty(shape, dtype=torch.float32)
        return memory, memory.new_empty(shape[:3]) if self.normalized else None

    def pad(self, memory: Tensor | None, normalizer: Tensor | None):
        """A state as wide as the operands."""
        key, value = self.key_width - self.widths[0], self.value_width - self.widths[1]
        if memory is not None:
            memory = F.pad(memory, (0, value, 0, key)).contiguous()
        if normalizer is not None:
            normalizer = F.pad(normalizer, (0, key)).contiguous()
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

    def products(self, blocks: int, heads: int) -> Tensor | None:
        if self.sums is None:
            return None
        return self.query.new_empty(blocks, heads, self.total, dtype=torch.float32)


def _states(
    plan: _Plan,
    memory: Tensor | None,
    normalizer: Tensor | None,
    end: Tensor | None = None,
    end_normalizer: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    memory, normalizer = plan.pad(memory, normalizer)
    states, normalizers = plan.slots(plan.chunks + plan.count)
    cut = plan.tiling("chunk_states")
    blocks = _blocks(plan.key_width, cut.key) * _blocks(plan.value_width, cut.value)
    launch(
        triton_forward.chunk_states,
        (plan.count * plan.state_heads * blocks,),
        {
            "key": plan.key, "value": plan.value, "sums": plan.sums, "memory": memory,
            "normalizer": normalizer, "states": states, "normalizers": normalizers,
            "end_memory": end, "end_normalizer": end_normalizer, **plan.sequences,
            **_strides("key", plan.key), **_strides("value", plan.value), **plan.sums_strides,
            "length": plan.length, "heads": plan.state_heads,
        },
        cut,
        **plan.constants(cut), STATES=plan.states,
        HAS_INITIAL=memory is not None, HAS_END=end is not None,
    )  # fmt: skip
    return states, normalizers


def _factors(plan: _Plan, output: Tensor, d_output: Tensor, weights: Tensor, eps: float) -> Tensor:
    factors = plan.query.new_empty(2, plan.heads, plan.total, dtype=torch.float32)
    (output,) = operands(output.to(plan.query.dtype))
    launch(
        triton_backward.output_factors,
        (_blocks(plan.total, TILE), plan.heads),
        {
            "output": output.contiguous(), "d_output": d_output, "weights": weights.contiguous(),
            "factors": factors, **_strides("d", d_output), "length": plan.length,
            "heads": plan.heads, "total": plan.total, "eps": eps,
        },
        Tiling(1, 1, 4, 2),
        VALUE_WIDTH=plan.value_width, BLOCK_V=min(64, plan.tiling("chunk_output").value), TILE=TILE,
    )  # fmt: skip
    return factors


def _d_states(
    plan: _Plan,
    shared: dict[str, object],
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
    cut = plan.tiling("chunk_d_states")
    blocks = _blocks(plan.key_width, cut.key) * _blocks(plan.value_width, cut.value)
    carried = None
    if plan.sums is not None:
        carried = plan.query.new_empty(blocks, plan.state_heads, plan.chunks, dtype=torch.float32)
    launch(
        triton_backward.chunk_d_states,
        (plan.count * plan.state_heads * blocks,),
        {
            **shared, "states": states, "normalizers": normalizers, "d_end_memory": d_end,
            "d_end_normalizer": d_end_normalizer, "d_states": d_states,
            "d_normalizers": d_normalizers, "carried": carried, "d_memory": d_memory,
            "d_normalizer": d_normalizer, "heads": plan.state_heads, "chunks": plan.chunks,
        },
        cut,
        **plan.constants(cut), QUERIES=plan.queries, HAS_END=d_end is not None,
        HAS_END_NORMALIZER=d_end_normalizer is not None, HAS_INITIAL=has_initial,
    )  # fmt: skip
    return d_states, d_normalizers, carried, d_memory, d_normalizer


def _d_log_decay(
    plan: _Plan, query_products: Tensor, key_products: Tensor, carried: Tensor, log_decay: Tensor
) -> Tensor:
    batch = plan.query.shape[0]
    found = plan.query.new_empty(batch, plan.length, plan.state_heads, dtype=torch.float32)
    launch(
        triton_backward.chunk_d_log_decay,
        (plan.chunks, plan.state_heads),
        {
            "query_products": query_products, "key_products": key_products, "carried": carried,
            "d_log_decay": found, **plan.sequences, "sequences": plan.count,
            "length": plan.length, "heads": plan.state_heads, "total": plan.total,
            "chunks": plan.chunks, "key_blocks": len(key_products), "state_blocks": len(carried),
        },
        Tiling(1, 1, 4, 1),
        CHUNK=CHUNK, QUERIES=plan.queries, PACKED=plan.packed,
    )  # fmt: skip
    if log_decay.dim() == 1:
        found = found.sum((0, 1))
    return found.masked_fill(log_decay < LOWEST_LOG_DECAY, 0).to(log_decay.dtype)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return dict(zip((f"{name}_batch", f"{name}_time", f"{name}_head"), x.stride(), strict=False))
