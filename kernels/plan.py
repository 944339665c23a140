"""What all launches of one call of an operation share, on the host.

A plan holds arguments by the names of the kernels' parameters, and a launch passes a kernel those
that it names. Compile-time constants are in CAPITALS.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from supra.kernels.decay import sums_in_chunks
from supra.kernels.launch import (
    ALL_CHANNELS,
    Rows,
    Table,
    Tiling,
    blocks,
    launch,
    operands,
    precision,
    sequences,
    storage_dtype,
    tiling,
)

RECURRENT: Table = {"recurrent_steps": {"any": ((256, Tiling(ALL_CHANNELS, 16, 4, 1)),)}}


class Plan:
    """Launches with tilings of `table`, for inputs of these widths."""

    def __init__(
        self, table: Table, widths: tuple[int, int], inputs: Sequence[Tensor], **given: Any
    ):
        """inputs: whose device and dtypes count. given: arguments that the launches share."""
        self.table, self.key_width, self.value_width = table, *widths
        self.device, self.dtype = inputs[0].device, storage_dtype(*inputs)
        self.precision = precision(*inputs)
        self.given = {**given, "PRECISION": self.precision}
        # of what one kernel leaves for another as an operand
        self.kept = torch.bfloat16 if self.precision == "bf16" else torch.float32

    def launch(self, kernel: Any, grid: tuple[int, ...], **own: Any) -> None:
        """Launch with the shared arguments, its row of the table, and its own arguments."""
        cut = self.tiling(kernel)
        launch(kernel, grid, self.given, cut, **(self.sizes(cut) | own))

    def sizes(self, cut: Tiling) -> dict[str, int]:
        """The sizes of a tile by the names of the kernels' constants."""
        return {"BLOCK_K": cut.key, "BLOCK_V": cut.value}

    def tiling(self, kernel: Any) -> Tiling:
        widths = self.key_width, self.value_width
        return tiling(self.table, kernel.__name__, *widths, self.device, self.precision)

    def blocks(self, kernel: Any) -> tuple[int, int]:
        """Blocks of key and of value channels."""
        cut = self.tiling(kernel)
        return blocks(self.key_width, cut.key), blocks(self.value_width, cut.value)

    def rows(self, x: Tensor | None) -> Rows | None:
        """x [B, T, H, D] in the dtype of the inputs, with stride 1 along D."""
        return None if x is None else Rows.of(contiguous_rows(x.to(self.dtype)))

    def new_sums(self, *shape: int) -> Tensor:
        """Room for float32 numbers that no kernel has written yet."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def new_kept(self, *shape: int) -> Tensor:
        """Room for what one kernel leaves for another, in the precision of an operand."""
        return torch.empty(shape, dtype=self.kept, device=self.device)


class HeadsPlan(Plan):
    """Launches over queries, keys and values [B, T, H, D] whose state is [N, Hs, K, V].

    The tensors are as wide as operands() makes them, the states too. Grids have a program for every
    chunk, or for every tile of a chunk, and block of channels: by_key(), by_value(); or for every
    state of a sequence and block of it: by_state().
    """

    def __init__(self, table: Table, x: Any, chunk: int, *, state_heads: int, tiles: int = 1):
        """x: Inputs of an operation. tiles: how many make a chunk."""
        query, key, value = operands(x.query, x.key, x.value)
        self.seqs, self.chunks = sequences(query, x.cu_seqlens, chunk)
        batch, length, self.heads, _ = query.shape
        self.query, self.key, self.value = query, key, value
        self.given_widths = x.key.shape[3], x.value.shape[3]
        self.kv_heads, self.state_heads = value.shape[2], state_heads
        self.count, self.total, self.tiles = self.seqs.count, batch * length, tiles
        widths = key.shape[3], value.shape[3]
        super().__init__(
            table, widths, (x.query, x.key, x.value),
            query=Rows.of(query), key=Rows.of(key), value=Rows.of(value), seqs=self.seqs,
            heads=state_heads, total=self.total, chunks=self.chunks, scale=x.scale,
            KEY_WIDTH=widths[0], VALUE_WIDTH=widths[1], CHUNK=chunk,
            QUERIES=self.heads // state_heads,
        )  # fmt: skip

    def add_d_output(self, d_output: Tensor) -> None:
        (d_output,) = operands(d_output.to(self.query.dtype))
        self.given["d_output"] = Rows.of(d_output)

    def by_key(self, kernel: Any, heads: int) -> tuple[int, int]:
        return self.chunks * self.tiles * self.blocks(kernel)[0], heads

    def by_value(self, kernel: Any, heads: int) -> tuple[int, int]:
        return self.chunks * self.tiles * self.blocks(kernel)[1], heads

    def by_state(self, kernel: Any) -> tuple[int]:
        key, value = self.blocks(kernel)
        return (self.count * self.state_heads * key * value,)

    def new_output(self) -> Tensor:
        return self.query.new_empty(*self.query.shape[:3], self.value_width)

    def new_state(self) -> Tensor:
        return self.new_sums(self.count, self.state_heads, self.key_width, self.value_width)

    def new_states(self, count: int) -> Tensor:
        """Room for `count` states per head, as operands."""
        return self.new_kept(count, self.state_heads, self.key_width, self.value_width)

    def pad(self, state: Tensor | None) -> Tensor | None:
        """A state [..., K, V] as wide as the operands."""
        if state is None:
            return None
        key, value = self.key_width - state.shape[-2], self.value_width - state.shape[-1]
        return F.pad(state, (0, value, 0, key)) if key or value else state.contiguous()

    def unpad(self, state: Tensor | None) -> Tensor | None:
        key, value = self.given_widths
        return None if state is None else state[..., :key, :value].contiguous()


class DecayedPlan(HeadsPlan):
    """With the sums of the decays' logs in every chunk, and what their gradient is made of."""

    def __init__(self, table: Table, x: Any, chunk: int, *, state_heads: int, tiles: int = 1):
        super().__init__(table, x, chunk, state_heads=state_heads, tiles=tiles)
        self.log_decay, self.decayed = x.log_decay, x.log_decay is not None
        self.given["sums"] = sums_in_chunks(x.log_decay, chunk, self.chunks, self.seqs)
        self.given["HAS_DECAY"] = self.decayed

    def new_products(self, kernel: Any, heads: int) -> Tensor | None:
        """Room for a number per token, head and block of key channels."""
        return self.new_sums(self.blocks(kernel)[0], heads, self.total) if self.decayed else None

    def new_carried(self, blocks: int) -> Tensor | None:
        """Room for a number per chunk, head and block of the state."""
        return self.new_sums(blocks, self.state_heads, self.chunks) if self.decayed else None


def narrow(x: Tensor, like: Tensor) -> Tensor:
    """A result that was padded as operands() does, as wide as `like` and in its dtype."""
    return x[..., : like.shape[-1]].to(like.dtype)


def narrow_heads(x: Any, *found: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x.query, x.key and x.value, as narrow() makes them."""
    return tuple(map(narrow, found, (x.query, x.key, x.value)))


def recurrent_steps(kernel: Any, x: Any, state_heads: int, **own: Any) -> Tensor:
    """Output [B, T, Hq, V] of the recurrence token by token; the kernel overwrites the state.

    x: Inputs of an operation. own: the state, and what the kernel takes beside queries, keys and
    values. A program has all channels of the keys and a block of those of the values.
    """
    batch, length, heads, key_width = x.query.shape
    value_width = x.value.shape[3]
    plan = Plan(
        RECURRENT, (key_width, value_width), (x.query, x.key, x.value),
        length=length, heads=state_heads, scale=x.scale,
        KEY_WIDTH=key_width, VALUE_WIDTH=value_width, QUERIES=heads // state_heads,
    )  # fmt: skip
    output = x.query.new_empty(batch, length, heads, value_width, dtype=plan.dtype)
    plan.launch(
        kernel, (batch * state_heads * plan.blocks(kernel)[1],), output=output,
        query=plan.rows(x.query), key=plan.rows(x.key), value=plan.rows(x.value), **own,
    )  # fmt: skip
    return output.to(x.value.dtype)


def contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
