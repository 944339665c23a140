"""The convolution on GPUs: the host side of the Triton kernels.

The gates are multiplied in where the inputs are brought into columns, time innermost, and where
columns are brought back; between the two all is products with the model's matrices.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from supra.kernels.checks import present
from supra.kernels.launch import ALL_CHANNELS, Rows, Table, Tiling, blocks, sequences
from supra.kernels.long_conv import triton_backward, triton_columns, triton_forward
from supra.kernels.long_conv.inputs import Inputs
from supra.kernels.long_conv.modes import (
    Matrices,
    d_model,
    d_toeplitz,
    matrices,
    toeplitz,
    transition,
)
from supra.kernels.plan import Plan, contiguous_rows

CHUNK = 64
PARTS = 16  # programs that share the rows of a matrix's gradient, at the most

# a tiling's key is rows of a block (channels where tensors become columns), its value is modes
SQUARE, FINE = Tiling(64, 64, 4, 2), Tiling(32, 32, 4, 1)
PRODUCT = {"any": ((64, SQUARE),), "any float32": ((64, FINE),)}
TILINGS: Table = {
    "gather_columns": {"any": ((64, Tiling(64, 64, 4, 1)),)},
    "contract_columns": {"any": ((64, Tiling(64, 64, 4, 1)),)},
    "chunk_steps": PRODUCT,
    "chunk_convolve": PRODUCT,
    "chunk_products": PRODUCT,
    "chunk_states": {"any": ((64, Tiling(16, 64, 4, 1)),)},
    "chunk_d_states": {"any": ((64, Tiling(16, 64, 4, 1)),)},
    "recurrent_steps": {"any": ((1, Tiling(ALL_CHANNELS, ALL_CHANNELS, 1, 1)),)},
}


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and final state; the kernels choose their chunks."""
    plan, has_initial = _Plan(x), x.state is not None
    columns = plan.gather(plan.key, plan.value)
    states, end = plan.states(columns, x.state)
    found = plan.convolve(columns, states, plan.toeplitz, plan.read.mT)
    output = plan.contract(found, plan.query, "key", x.value, first=has_initial)
    return output, plan.state_of(end)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; the states are computed again."""
    plan, has_initial = _Plan(x), x.state is not None
    d_output = plan.flat_rows(d_output)
    columns = plan.gather(plan.key, plan.value)
    states, _ = plan.states(columns, x.state)
    d_query = d_key = None
    if x.query is not None:
        found = plan.convolve(columns, states, plan.toeplitz, plan.read.mT)
        d_query = plan.contract(found, d_output, "value", x.query, first=has_initial)
    d_found = plan.gather(plan.query, d_output, first=has_initial)
    d_states, d_state, whole = plan.d_states(d_found, states, d_end)
    d_columns = plan.convolve(d_found, d_states, plan.toeplitz.mT, plan.write.mT)
    if x.key is not None:
        d_key = plan.contract(d_columns, plan.value, "value", x.key)
    d_value = plan.contract(d_columns, plan.key, "key", x.value)

    found = Matrices(
        d_toeplitz(plan.products(columns, d_found)),
        plan.modes_of(plan.products(d_found, states)),
        plan.modes_of(plan.products(columns, d_states)),
    )
    return (
        d_query,
        d_key,
        d_value,
        *d_model(x.model, found, whole),
        None if x.state is None else plan.state_of(d_state),
    )


def recurrent(x: Inputs) -> Tensor:
    """Output of the recurrence token by token; the state is updated in place."""
    batch, length, heads, width = x.value.shape
    modes, plan = x.log_decay.shape[1], Plan(TILINGS, (1, 1), present(x.value, *x[:2]))
    output = x.value.new_empty(x.value.shape, dtype=plan.dtype)
    plan.launch(
        triton_forward.recurrent_steps, (batch * heads,), output=output,
        query=plan.rows(x.query), key=plan.rows(x.key), value=plan.rows(x.value),
        power=torch.view_as_real(transition(x.model, 1)), weight=x.weight.contiguous(),
        skip=x.skip, state=x.state, length=length, heads=heads,
        MODES=modes, KEY_WIDTH=x.key_width, VALUE_WIDTH=width,
        BLOCK_M=triton.next_power_of_2(modes), BLOCK_V=triton.next_power_of_2(width),
    )  # fmt: skip
    return output.to(x.value.dtype)


class _Plan(Plan):
    """With the inputs as rows, and the model's matrices."""

    def __init__(self, x: Inputs):
        _, self.length, self.heads, self.v_width = x.value.shape
        self.k_width = x.key_width
        self.seqs, self.chunks = sequences(x.value, x.cu_seqlens, CHUNK)
        self.count = self.seqs.count
        self.slots = self.chunks + (0 if x.state is None else self.count)
        self.columns = self.k_width * self.v_width
        self.lines, self.lanes = self.columns * self.slots, self.heads * self.columns

        self.known = x.log_decay.shape[1]
        self.modes = max(8, triton.next_power_of_2(self.known))
        made = matrices(x.model, CHUNK)
        self.toeplitz = toeplitz(made.taps)
        self.read, self.write = map(self.padded, (made.read, made.write))
        self.counts = self._first_counts(x.cu_seqlens, x.value.device)
        whole, early = (transition(x.model, count) for count in (CHUNK, self.counts))
        super().__init__(
            TILINGS, (CHUNK, CHUNK), present(x.value, *x[:2]), seqs=self.seqs,
            chunks=self.chunks, slots=self.slots, rows=self.lines, lanes=self.lanes,
            heads=self.heads, whole=self.padded(torch.view_as_real(whole)),
            early=self.padded(torch.view_as_real(early)), HAS_INITIAL=x.state is not None,
            COLUMNS=self.columns, KEY_WIDTH=self.k_width, VALUE_WIDTH=self.v_width,
            MODES=2 * self.modes, CHUNK=CHUNK,
        )  # fmt: skip
        self.query, self.key, self.value = map(self.flat_rows, x[:3])

    def _first_counts(self, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
        """Tokens of every sequence's first chunk [N, 1, 1]; any number where it has none."""
        if cu_seqlens is None:
            return torch.full((self.count, 1, 1), (self.length - 1) % CHUNK + 1, device=device)
        sizes = cu_seqlens.to(device, non_blocking=True).diff()
        return ((sizes - 1) % CHUNK + 1)[:, None, None]

    def flat_rows(self, x: Tensor | None) -> Tensor | None:
        """[B, T, H, D] -> [B, T, H * D] in the dtype of the inputs, stride 1 along the last."""
        return None if x is None else contiguous_rows(x.to(self.dtype).flatten(2))

    def padded(self, x: Tensor) -> Tensor:
        """[..., M, 2] -> [..., MODES], modes of zeros added."""
        return F.pad(x, (0, 0, 0, self.modes - self.known)).flatten(-2).contiguous()

    def modes_of(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2))[..., : self.known, :]

    def sizes(self, cut: Tiling) -> dict[str, int]:
        return {"BLOCK": cut.key, "BLOCK_M": min(cut.value, 2 * self.modes)}

    def gather(self, left: Tensor | None, right: Tensor, *, first: bool = False) -> Tensor:
        """Products of key and value, or of query and d_output, as columns [H, lines, CHUNK].

        first: in the slots of first tokens too.
        """
        columns = self.new_kept(self.heads, self.lines, CHUNK)
        key, value, heads = self.tile(triton_columns.gather_columns)
        across = blocks(self.k_width, key) * blocks(self.v_width, value)
        self.launch(
            triton_columns.gather_columns, (self.slots, blocks(self.heads, heads), across),
            left=Rows.of(left), right=Rows.of(right), columns=columns,
            HEADS=heads, BLOCK_K=key, BLOCK_V=value, HAS_FIRST=first,
        )  # fmt: skip
        return columns

    def contract(
        self, columns: Tensor, by: Tensor | None, over: str, like: Tensor, *, first: bool = False
    ) -> Tensor:
        """Columns times `by`, summed over their "key" or "value" width: a tensor like `like`.

        first: with what the slots of first tokens hold.
        """
        key, value, heads = self.tile(triton_columns.contract_columns)
        grid = blocks(self.heads, heads), blocks(like.shape[3], value if over == "key" else key)
        output = self.value.new_empty(like.flatten(2).shape)
        for slots in (False, True) if first else (False,):
            self.launch(
                triton_columns.contract_columns, (self.count if slots else self.chunks, *grid),
                columns=columns, by=Rows.of(by), output=Rows.of(output),
                HEADS=heads, BLOCK_K=key, BLOCK_V=value, OVER_KEY=over == "key", FIRST=slots,
            )  # fmt: skip
        return output.view(like.shape).to(like.dtype)

    def tile(self, kernel: Any) -> tuple[int, int, int]:
        """Channels of K and of V in a tile of columns, and heads.

        At least 16 channels of V, so that 64 tokens of them are 128 bits for each thread.
        """
        columns = self.tiling(kernel).key
        value = min(triton.next_power_of_2(self.v_width), columns)
        key = min(triton.next_power_of_2(self.k_width), columns // value)
        return key, value, max(columns // (key * value), 16 // value, 1)

    def steps(self, columns: Tensor, matrix: Tensor) -> Tensor:
        steps = self.new_sums(self.heads, self.lines, 2 * self.modes)
        cut = self.tiling(triton_forward.chunk_steps)
        self.launch(
            triton_forward.chunk_steps,
            (blocks(self.lines, cut.key), self.heads, blocks(2 * self.modes, cut.value)),
            columns=columns, matrix=matrix.to(self.kept).contiguous(), steps=steps,
        )  # fmt: skip
        return steps

    def states(self, columns: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """States that the chunks enter with [H, lines, MODES], and the end [N, lanes, MODES]."""
        states, end = self.slots_of_states(), self.lane_states()
        self.launch(
            triton_forward.chunk_states, self.by_lane(triton_forward.chunk_states),
            steps=self.steps(columns, self.write), states=states, end=end,
            initial=self.lanes_of(initial),
        )  # fmt: skip
        return states, end

    def d_states(
        self, d_found: Tensor, states: Tensor, d_end: Tensor | None
    ) -> tuple[Tensor, Tensor, list[tuple[int | Tensor, Tensor]]]:
        """Gradients of the steps, of the initial state, and of powers with their counts."""
        d_states = self.slots_of_states()
        d_initial, d_whole, d_early = (self.lane_states() for _ in range(3))
        self.launch(
            triton_backward.chunk_d_states, self.by_lane(triton_backward.chunk_d_states),
            steps=self.steps(d_found, self.read), states=states, d_states=d_states,
            d_end=self.lanes_of(d_end), d_initial=d_initial, d_whole=d_whole, d_early=d_early,
            HAS_END=d_end is not None,
        )  # fmt: skip
        found = [(CHUNK, self.powers_of(d_whole).sum(0))]
        if self.given["HAS_INITIAL"]:
            found.append((self.counts, self.powers_of(d_early)))
        return d_states, d_initial, found

    def powers_of(self, lanes: Tensor) -> Tensor:
        """[N, lanes, MODES] -> complex [N, H, M], summed over columns."""
        by_head = self.modes_of(lanes.unflatten(1, (self.heads, -1)).sum(2))
        return torch.view_as_complex(by_head.contiguous())

    def convolve(self, columns: Tensor, states: Tensor, near: Tensor, far: Tensor) -> Tensor:
        output, cut = torch.empty_like(columns), self.tiling(triton_forward.chunk_convolve)
        self.launch(
            triton_forward.chunk_convolve, (blocks(self.lines, cut.key), self.heads),
            columns=columns, states=states, output=output,
            near=near.to(self.kept).contiguous(), far=far.to(self.kept).contiguous(),
        )  # fmt: skip
        return output

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Sums over lines of left [H, lines, L] times right [H, lines, R] -> [H, L, R]."""
        cut = self.tiling(triton_backward.chunk_products)
        parts = min(PARTS, blocks(self.lines, cut.key))
        sizes = left.shape[2], right.shape[2]
        block_m = min(cut.value, *sizes)
        products = left.new_empty(parts, self.heads, *sizes, dtype=torch.float32)
        grid = parts * blocks(sizes[0], block_m) * blocks(sizes[1], block_m)
        self.launch(
            triton_backward.chunk_products, (grid, self.heads),
            left=left, right=right, products=products, parts=parts,
            LEFT=sizes[0], RIGHT=sizes[1], BLOCK_M=block_m,
        )  # fmt: skip
        return products.sum(0)

    def by_lane(self, kernel: Any) -> tuple[int, int, int]:
        cut = self.tiling(kernel)
        return self.count, blocks(self.lanes, cut.key), blocks(2 * self.modes, cut.value)

    def slots_of_states(self) -> Tensor:
        """Packed rows may have fewer chunks than slots, and what is there is multiplied by zero."""
        shape = (self.heads, self.lines, 2 * self.modes)
        new = self.value.new_zeros if self.seqs.cu_seqlens is not None else self.value.new_empty
        return new(shape, dtype=self.kept)

    def lane_states(self) -> Tensor:
        return self.new_sums(self.count, self.lanes, 2 * self.modes)

    def lanes_of(self, state: Tensor | None) -> Tensor | None:
        """[N, H, M, 2, K, V] -> [N, lanes, MODES]"""
        if state is None:
            return None
        return self.padded(state.permute(0, 1, 4, 5, 2, 3).flatten(1, 3))

    def state_of(self, lanes: Tensor) -> Tensor:
        widths = (self.heads, self.k_width, self.v_width)
        return self.modes_of(lanes).unflatten(1, widths).permute(0, 1, 4, 5, 2, 3).contiguous()
