"""The gated delta rule on GPUs: the host side of the Triton kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels.decay import SMALL, d_log_decay, sums_in_chunks
from supra.kernels.gated_delta_rule import (
    triton_backward,
    triton_backward_keys,
    triton_forward,
)
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

# T is as wide as its chunk: with 128 tokens a token would cost 5 times the work to invert it, in
# tiles that no longer fit the registers, to halve the bytes of the states, which up to heads of 128
# are fewer than those of W, e and T.
CHUNK = 64

# 64 x 64 wherever that does not spill; one stage where operands of 32 bits fill the shared memory.
SQUARE, LOW, FLAT = Tiling(64, 64, 4, 2), Tiling(32, 64, 4, 2), Tiling(32, 32, 4, 2)
TALL, FLOAT32 = Tiling(64, 32, 4, 2), ((256, Tiling(32, 32, 4, 1)),)

# The scans hold all channels of the keys. From 129 on they need 8 warps, or narrower blocks where 8
# warps may race: on Blackwell before Triton 3.8, which is sm_100 and some of "small". There, as
# code for sm_80, two stages would spill 336 bytes.
UP_TO_128 = ((32, Tiling(32, 32, 4, 1)), (128, Tiling(128, 32, 4, 2)))
SCANS = {
    "any": (*UP_TO_128, (256, Tiling(128, 32, 8, 1))),
    "small": (*UP_TO_128, (256, Tiling(128, 16, 4, 1))),
    "any float32": ((256, Tiling(128, 16, 4, 1)),),
}
SCANS_100 = (
    (32, Tiling(32, 32, 4, 1)), (128, Tiling(128, 32, 4, 3)), (256, Tiling(128, 16, 4, 3)),
)  # fmt: skip
D_SCANS_100 = ((32, Tiling(32, 32, 4, 1)), (256, Tiling(128, 16, 4, 2)))

TILINGS: Table = {
    "chunk_inverse": {"any": ((256, SQUARE),), "any float32": FLOAT32},
    "chunk_solve": {"any": ((256, SQUARE),), "any float32": FLOAT32},
    "chunk_states": SCANS | {"sm_100": SCANS_100},
    "chunk_output": {"any": ((256, SQUARE),), "any float32": FLOAT32},
    "chunk_d_written": {"any": ((256, SQUARE),), "any float32": FLOAT32},
    "chunk_d_states": SCANS | {"sm_100": D_SCANS_100},
    "chunk_d_value": {"any": ((256, SQUARE),), "any float32": FLOAT32},
    "chunk_d_overlap": {
        "any": ((256, FLAT),), "sm_90": ((256, LOW),), "any float32": FLOAT32,
    },
    "chunk_d_query": {
        "any": ((256, LOW),), "sm_90": ((256, SQUARE),), "any float32": FLOAT32,
    },
    "chunk_d_key": {
        "any": ((128, LOW), (256, FLAT)), "sm_90": ((256, TALL),), "any float32": FLOAT32,
    },
    "recurrent_steps": {"any": ((256, Tiling(ALL_CHANNELS, 16, 4, 1)),)},
}  # fmt: skip


def chunk_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Arguments and results are those of operator.forward; chunks have CHUNK tokens."""
    plan = _Plan(query, key, value, beta, log_decay, cu_seqlens, scale)
    end = plan.new_state()
    _, _, errors, states = _states(plan, state, end)
    output = plan.query.new_empty(*query.shape[:3], plan.value_width)
    plan.launch(
        triton_forward.chunk_output, plan.grid("chunk_output", "value", plan.query_heads),
        errors=errors, states=states, output=output,
    )  # fmt: skip
    return output[..., : value.shape[3]].to(value.dtype), plan.unpad(end)


def chunk_backward(
    d_output: Tensor,
    d_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor | None, ...]:
    """Arguments and results are those of operator.backward; T and the states are computed again."""
    plan = _Plan(query, key, value, beta, log_decay, cu_seqlens, scale)
    (d_output,) = operands(d_output.to(plan.query.dtype))
    plan.arguments |= {"d_output": d_output, **strides("d", d_output)}
    inverse, reading, errors, states = _states(plan, state)
    d_states, d_written, d_initial = _d_states(plan, reading, d_state, state is not None)
    del reading

    d_value = torch.empty_like(errors)
    d_beta = plan.new_sums(plan.blocks("chunk_d_value", "value"), plan.heads)
    plan.launch(
        triton_backward.chunk_d_value, plan.grid("chunk_d_value", "value"),
        inverse=inverse, errors=errors, d_written=d_written, d_value=d_value, d_beta=d_beta,
    )  # fmt: skip
    del d_written

    blocks = plan.blocks("chunk_d_key", "key")
    assert blocks == plan.blocks("chunk_d_query", "key"), "dq and dk cut the channels alike"
    key_products = plan.new_sums(blocks, plan.heads) if plan.decayed else None
    plan.launch(
        triton_backward_keys.chunk_d_overlap, (plan.chunks, plan.heads),
        errors=errors, d_value=d_value, d_overlap=inverse, key_products=key_products,
    )  # fmt: skip

    query_products = plan.new_sums(blocks, plan.query_heads) if plan.decayed else None
    d_query = plan.query.new_empty(*query.shape[:3], plan.key_width)
    plan.launch(
        triton_backward_keys.chunk_d_query, plan.grid("chunk_d_query", "key", plan.query_heads),
        errors=errors, states=states, d_query=d_query, query_products=query_products,
    )  # fmt: skip

    d_key = plan.key.new_empty(*key.shape[:3], plan.key_width)
    carried = None
    if plan.decayed:
        carried = plan.query.new_empty(blocks, plan.heads, plan.chunks, dtype=torch.float32)
    plan.launch(
        triton_backward_keys.chunk_d_key, plan.grid("chunk_d_key", "key"),
        errors=errors, states=states, d_states=d_states, d_value=d_value, d_overlap=inverse,
        d_key=d_key, key_products=key_products, carried=carried,
    )  # fmt: skip
    gradient = None
    if plan.decayed:
        gradient = d_log_decay(
            log_decay, {**plan.arguments, **plan.constants}, query_products,
            key_products=key_products, carried=carried,
        )  # fmt: skip
    return (
        d_query[..., : query.shape[3]].to(query.dtype),
        d_key[..., : key.shape[3]].to(key.dtype),
        d_value[..., : value.shape[3]].to(value.dtype),
        d_beta.sum(0).T.reshape(beta.shape).to(beta.dtype),
        gradient,
        None if d_initial is None else plan.unpad(d_initial),
    )


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Output of the recurrence token by token; the state is updated in place."""
    batch, length, query_heads, key_width = query.shape
    (heads, value_width), output_dtype = value.shape[2:], value.dtype
    dtype = storage_dtype(common_dtype(query, key, value))
    query, key, value = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (x.to(dtype) for x in (query, key, value))
    )
    output = query.new_empty(batch, length, query_heads, value_width)
    cut = tiling(TILINGS, "recurrent_steps", key_width, value_width, query.device)
    decay_strides = (0, 0, 0) if log_decay is None else (0, 0, *log_decay.stride())[-3:]
    launch(
        triton_forward.recurrent_steps,
        (batch * heads * blocks(value_width, cut.value),),
        {
            "query": query, "key": key, "value": value, "beta": beta, "log_decay": log_decay,
            "state": state, "output": output, **strides("query", query), **strides("key", key),
            **strides("value", value), **strides("beta", beta),
            **dict(zip(("decay_batch", "decay_time", "decay_head"), decay_strides, strict=True)),
            "length": length, "heads": heads, "scale": scale,
        },
        cut,
        KEY_WIDTH=key_width, VALUE_WIDTH=value_width, BLOCK_K=cut.key, BLOCK_V=cut.value,
        QUERIES=query_heads // heads, HAS_DECAY=log_decay is not None,
    )  # fmt: skip
    return output.to(output_dtype)


class _Plan:
    """What all launches of one call share: operands, sizes, sequences and decay sums.

    `arguments` and `constants` hold them by the names of the kernels' parameters.
    """

    def __init__(self, query, key, value, beta, log_decay, cu_seqlens, scale):
        self.widths = key.shape[3], value.shape[3]
        self.precision, self.decayed = precision(query, key, value), log_decay is not None
        # of what is kept between kernels
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.query, self.key, self.value = operands(query, key, value)
        batch, self.length, self.query_heads, self.key_width = self.query.shape
        self.heads, self.value_width = self.value.shape[2:]
        self.total = batch * self.length
        found, self.chunks = sequences(self.query, cu_seqlens, CHUNK)
        self.count = found["sequences"]
        self.constants = {
            "KEY_WIDTH": self.key_width, "VALUE_WIDTH": self.value_width, "CHUNK": CHUNK,
            "QUERIES": self.query_heads // self.heads, "HAS_DECAY": self.decayed,
            "PRECISION": self.precision,
        }  # fmt: skip
        beta = beta.float()
        self.arguments = {
            "query": self.query, "key": self.key, "beta": beta,
            **strides("query", self.query), **strides("key", self.key), **strides("beta", beta),
            **found, "heads": self.heads, "total": self.total, "chunks": self.chunks,
            "scale": scale,
        }  # fmt: skip
        sums = {"sums": None, "sums_batch": 0, "sums_time": 0, "sums_head": 0}
        if self.decayed:
            sums = sums_in_chunks(log_decay, CHUNK, self.chunks, found)
        self.arguments |= sums

    def launch(self, kernel, grid: tuple[int, ...], **own: object) -> None:
        """Launch the kernel with those of the shared arguments that it names, and its own."""
        name = kernel.__name__
        cut = self.tiling(name) if name in TILINGS else SMALL
        shared = {**self.arguments, **self.constants, "BLOCK_K": cut.key, "BLOCK_V": cut.value}
        launch(kernel, grid, {**shared, **own}, cut)

    def tiling(self, kernel: str) -> Tiling:
        widths = self.key_width, self.value_width
        return tiling(TILINGS, kernel, *widths, self.query.device, self.precision)

    def blocks(self, kernel: str, side: str) -> int:
        """Blocks of channels that the kernel cuts a key or a value into."""
        width = {"key": self.key_width, "value": self.value_width}[side]
        return blocks(width, getattr(self.tiling(kernel), side))

    def grid(self, kernel: str, side: str, heads: int | None = None) -> tuple[int, int]:
        return self.chunks * self.blocks(kernel, side), heads or self.heads

    def lanes(self, kernel: str) -> tuple[int]:
        """A grid of programs that go along whole sequences."""
        return (self.count * self.heads * self.blocks(kernel, "value"),)

    def new_kept(self, width: int) -> Tensor:
        """What one kernel leaves for another, [B, T, Hkv, width]."""
        return self.key.new_empty(*self.key.shape[:3], width, dtype=self.dtype)

    def new_sums(self, blocks: int, heads: int) -> Tensor:
        return self.query.new_empty(blocks, heads, self.total, dtype=torch.float32)

    def new_slots(self, count: int) -> Tensor:
        """Room for `count` states per head."""
        shape = (count, self.heads, self.key_width, self.value_width)
        return self.query.new_empty(shape, dtype=self.dtype)

    def new_state(self) -> Tensor:
        shape = (self.count, self.heads, self.key_width, self.value_width)
        return self.query.new_empty(shape, dtype=torch.float32)

    def pad(self, state: Tensor | None) -> Tensor | None:
        """A state as wide as the operands."""
        key, value = self.key_width - self.widths[0], self.value_width - self.widths[1]
        return None if state is None else F.pad(state, (0, value, 0, key)).contiguous()

    def unpad(self, state: Tensor) -> Tensor:
        return state[:, :, : self.widths[0], : self.widths[1]].contiguous()


def _states(
    plan: _Plan, state: Tensor | None, end: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T, W, the errors, and the states before every chunk and after the last."""
    inverse = plan.new_kept(CHUNK)
    plan.launch(
        triton_forward.chunk_inverse, (plan.chunks, plan.heads),
        inverse=inverse, SOLVE="tf32x3" if plan.precision == "tf32x3" else "tf32",
    )  # fmt: skip
    found = []
    for side, x in (("key", plan.key), ("value", plan.value)):
        found.append(plan.new_kept(x.shape[3]))
        plan.launch(
            triton_forward.chunk_solve, plan.grid("chunk_solve", side),
            inverse=inverse, x=x, **strides("x", x), found=found[-1], WIDTH=x.shape[3],
            BLOCK=getattr(plan.tiling("chunk_solve"), side),
            DECAYED=plan.decayed and side == "key",
        )  # fmt: skip
    reading, errors = found
    states = plan.new_slots(plan.chunks + plan.count)
    plan.launch(
        triton_forward.chunk_states, plan.lanes("chunk_states"),
        reading=reading, errors=errors, initial=plan.pad(state), states=states, end=end,
        HAS_INITIAL=state is not None, HAS_END=end is not None,
    )  # fmt: skip
    return inverse, reading, errors, states


def _d_states(
    plan: _Plan, reading: Tensor, d_end: Tensor | None, has_initial: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the state after every chunk, of what is written, and of the initial state."""
    d_written = plan.new_kept(plan.value_width)
    plan.launch(
        triton_backward.chunk_d_written, plan.grid("chunk_d_written", "value"),
        d_written=d_written,
    )  # fmt: skip
    d_states = plan.new_slots(plan.chunks)
    d_initial = plan.new_state() if has_initial else None
    plan.launch(
        triton_backward.chunk_d_states, plan.lanes("chunk_d_states"),
        reading=reading, d_written=d_written, d_end=plan.pad(d_end), d_states=d_states,
        d_initial=d_initial, HAS_END=d_end is not None, HAS_INITIAL=has_initial,
    )  # fmt: skip
    return d_states, d_written, d_initial
