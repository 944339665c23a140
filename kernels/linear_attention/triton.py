"""Linear attention on GPUs: the host side of the Triton kernels."""

import math

from torch import Tensor

from supra.kernels.decay import d_log_decay
from supra.kernels.launch import Table, Tiling, blocks, operands, pad_width
from supra.kernels.linear_attention import triton_backward, triton_backward_states, triton_forward
from supra.kernels.linear_attention.inputs import Inputs
from supra.kernels.plan import DecayedPlan, narrow, narrow_heads
from supra.kernels.recurrent import decode

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
}  # fmt: skip


def forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output, final memory and normalizer, and weights; the kernels choose their chunks."""
    plan = _Plan(x)
    end, end_z = plan.new_state(), plan.new_normalizers(plan.count)
    states, normalizers = _states(plan, x, end, end_z)
    output = plan.new_output()
    weights = plan.new_sums(*x.query.shape[:3]) if x.normalized else None
    kernel = triton_forward.chunk_output
    plan.launch(
        kernel, plan.by_value(kernel, plan.heads), heads=plan.heads,
        states=states, normalizers=normalizers, output=output, weights=weights,
    )  # fmt: skip
    return narrow(output, x.value), plan.unpad(end), plan.unpad_normalizer(end_z), weights


def backward(
    x: Inputs,
    d_output: Tensor,
    d_memory: Tensor | None,
    d_normalizer: Tensor | None,
    output: Tensor,
    weights: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; the states are computed again."""
    plan = _Plan(x)
    plan.add_d_output(d_output)
    plan.given["factors"] = _factors(plan, output, weights) if x.normalized else None
    states, normalizers = _states(plan, x)
    d_states, d_normalizers, carried, d_memory, d_normalizer = _d_states(
        plan, states, normalizers, d_memory, d_normalizer, x.memory is not None
    )

    d_value, kernel = plan.value.new_empty(plan.value.shape), triton_backward.chunk_d_value
    plan.launch(
        kernel, plan.by_value(kernel, plan.kv_heads), heads=plan.kv_heads,
        d_states=d_states, d_value=d_value,
    )  # fmt: skip
    d_query, kernel = plan.query.new_empty(plan.query.shape), triton_backward.chunk_d_query
    query_products = plan.new_products(kernel, plan.heads)
    plan.launch(
        kernel, plan.by_key(kernel, plan.heads), heads=plan.heads, states=states,
        normalizers=normalizers, d_query=d_query, query_products=query_products,
    )  # fmt: skip
    d_key, kernel = plan.key.new_empty(plan.key.shape), triton_backward.chunk_d_key
    key_products = plan.new_products(kernel, plan.state_heads)
    plan.launch(
        kernel, plan.by_key(kernel, plan.kv_heads), heads=plan.kv_heads, d_states=d_states,
        d_normalizers=d_normalizers, d_key=d_key, key_products=key_products,
    )  # fmt: skip

    return (
        *narrow_heads(x, d_query, d_key, d_value),
        d_log_decay(plan.log_decay, plan.given, query_products, key_products, carried),
        plan.unpad(d_memory),
        plan.unpad_normalizer(d_normalizer),
    )


def recurrent(x: Inputs) -> Tensor:
    """Output of the recurrence token by token; memory and normalizer are updated in place."""
    end = None if x.normalizer is None else x.normalizer.new_empty(x.normalizer.shape)
    own = {"normalizer": x.normalizer, "end_normalizer": end, "eps": x.eps}
    output = decode(x, x.state_heads, x.memory, **own)
    if x.normalizer is not None:
        x.normalizer.copy_(end)
    return output


class _Plan(DecayedPlan):
    """With normalizers [N, Hs, K] beside the states."""

    def __init__(self, x: Inputs):
        super().__init__(TILINGS, x, CHUNK, state_heads=x.state_heads, tiles=CHUNK // TILE)
        self.normalized = x.normalized
        self.given |= {"eps": x.eps, "TILE": TILE, "STATES": self.state_heads // self.kv_heads}

    def new_normalizers(self, count: int) -> Tensor | None:
        return self.new_sums(count, self.state_heads, self.key_width) if self.normalized else None

    def pad_normalizer(self, normalizer: Tensor | None) -> Tensor | None:
        """A normalizer as wide as the operands."""
        return None if normalizer is None else pad_width(normalizer).contiguous()

    def unpad_normalizer(self, normalizer: Tensor | None) -> Tensor | None:
        return None if normalizer is None else normalizer[..., : self.given_widths[0]].contiguous()


def _states(
    plan: _Plan, x: Inputs, end: Tensor | None = None, end_normalizer: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The states and normalizers before every chunk and after the last."""
    slots = plan.chunks + plan.count
    states, normalizers = plan.new_states(slots), plan.new_normalizers(slots)
    kernel = triton_forward.chunk_states
    plan.launch(
        kernel, plan.by_state(kernel),
        memory=plan.pad(x.memory), normalizer=plan.pad_normalizer(x.normalizer), states=states,
        normalizers=normalizers, end_memory=end, end_normalizer=end_normalizer,
    )  # fmt: skip
    return states, normalizers


def _factors(plan: _Plan, output: Tensor, weights: Tensor) -> Tensor:
    factors = plan.new_sums(plan.heads, plan.total, 2)
    (output,) = operands(output.to(plan.query.dtype))
    plan.launch(
        triton_backward_states.output_factors, (blocks(plan.total, TILE), plan.heads),
        output=output.contiguous(), weights=weights.contiguous(), factors=factors,
        heads=plan.heads,
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
    kernel = triton_backward_states.chunk_d_states
    d_memory = plan.new_state() if has_initial else None
    d_normalizer = plan.new_normalizers(plan.count) if has_initial else None
    d_states, d_normalizers = plan.new_states(plan.chunks), plan.new_normalizers(plan.chunks)
    carried = plan.new_carried(math.prod(plan.blocks(kernel)))
    plan.launch(
        kernel, plan.by_state(kernel),
        states=states, normalizers=normalizers, d_end_memory=plan.pad(d_end),
        d_end_normalizer=plan.pad_normalizer(d_end_normalizer), d_states=d_states,
        d_normalizers=d_normalizers, carried=carried, d_memory=d_memory, d_normalizer=d_normalizer,
    )  # fmt: skip
    return d_states, d_normalizers, carried, d_memory, d_normalizer
