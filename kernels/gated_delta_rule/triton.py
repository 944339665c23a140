"""The gated delta rule on GPUs: the host side of the Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from supra.kernels.gated_delta_rule import triton_backward, triton_backward_keys, triton_forward
from supra.kernels.gated_delta_rule.inputs import Inputs
from supra.kernels.launch import ALL_CHANNELS, Table, Tiling, strides
from supra.kernels.plan import DecayedPlan, narrow, narrow_heads, recurrent_steps

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


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and final state; chunks have CHUNK tokens."""
    plan, kernel = _Plan(x), triton_forward.chunk_output
    end, output = plan.new_state(), plan.new_output()
    _, _, errors, states = _states(plan, x.state, end)
    plan.launch(
        kernel, plan.by_value(kernel, plan.heads), errors=errors, states=states, output=output
    )
    return narrow(output, x.value), plan.unpad(end)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; T and the states are computed again."""
    plan = _Plan(x)
    plan.add_d_output(d_output)
    inverse, reading, errors, states = _states(plan, x.state)
    d_states, d_written, d_initial = _d_states(plan, reading, d_end, x.state is not None)
    del reading

    d_value, kernel = torch.empty_like(errors), triton_backward.chunk_d_value
    d_beta = plan.new_sums(plan.blocks(kernel)[1], plan.kv_heads, plan.total)
    plan.launch(
        kernel, plan.by_value(kernel, plan.kv_heads),
        inverse=inverse, errors=errors, d_written=d_written, d_value=d_value, d_beta=d_beta,
    )  # fmt: skip
    del d_written

    key_products = plan.new_products(triton_backward_keys.chunk_d_key, plan.kv_heads)
    plan.launch(
        triton_backward_keys.chunk_d_overlap, (plan.chunks, plan.kv_heads),
        errors=errors, d_value=d_value, d_overlap=inverse, key_products=key_products,
    )  # fmt: skip
    d_query, kernel = plan.query.new_empty(plan.query.shape), triton_backward_keys.chunk_d_query
    query_products = plan.new_products(kernel, plan.heads)
    plan.launch(
        kernel, plan.by_key(kernel, plan.heads),
        errors=errors, states=states, d_query=d_query, query_products=query_products,
    )  # fmt: skip
    d_key, kernel = plan.key.new_empty(plan.key.shape), triton_backward_keys.chunk_d_key
    carried = plan.new_carried(plan.blocks(kernel)[0])
    plan.launch(
        kernel, plan.by_key(kernel, plan.kv_heads),
        errors=errors, states=states, d_states=d_states, d_value=d_value, d_overlap=inverse,
        d_key=d_key, key_products=key_products, carried=carried,
    )  # fmt: skip
    return (
        *narrow_heads(x, d_query, d_key, d_value),
        d_beta.sum(0).T.reshape(x.beta.shape).to(x.beta.dtype),
        plan.d_log_decay(query_products, key_products, carried),
        plan.unpad(d_initial),
    )


def recurrent(x: Inputs) -> Tensor:
    """Output of the recurrence token by token; the state is updated in place."""
    return recurrent_steps(
        triton_forward.recurrent_steps, TILINGS, x, x.key.shape[2],
        beta=x.beta, **strides("beta", x.beta), log_decay=x.log_decay,
        **strides("decay", x.log_decay), state=x.state, HAS_DECAY=x.log_decay is not None,
    )  # fmt: skip


class _Plan(DecayedPlan):
    """With the strengths of writing."""

    def __init__(self, x: Inputs):
        super().__init__(TILINGS, x, CHUNK, state_heads=x.key.shape[2])
        beta = x.beta.float()
        self.given |= {"beta": beta, **strides("beta", beta)}

    def kept_rows(self, width: int) -> Tensor:
        """Room for what one kernel leaves for another, [B, T, Hkv, width]."""
        return self.new_kept(*self.key.shape[:3], width)


def _states(
    plan: _Plan, state: Tensor | None, end: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T, W, the errors, and the states before every chunk and after the last."""
    inverse = plan.kept_rows(CHUNK)
    plan.launch(
        triton_forward.chunk_inverse, (plan.chunks, plan.kv_heads),
        inverse=inverse, SOLVE="tf32x3" if plan.precision == "tf32x3" else "tf32",
    )  # fmt: skip
    kernel = triton_forward.chunk_solve
    cut, (by_key, by_value) = plan.tiling(kernel), (plan.by_key, plan.by_value)
    found = []
    for x, block, grid in ((plan.key, cut.key, by_key), (plan.value, cut.value, by_value)):
        found.append(plan.kept_rows(x.shape[3]))
        plan.launch(
            kernel, grid(kernel, plan.kv_heads), inverse=inverse, x=x, **strides("x", x),
            found=found[-1], WIDTH=x.shape[3], BLOCK=block, DECAYED=plan.decayed and x is plan.key,
        )  # fmt: skip
    reading, errors = found
    states, kernel = plan.new_states(plan.chunks + plan.count), triton_forward.chunk_states
    plan.launch(
        kernel, _by_sequence(plan, kernel),
        reading=reading, errors=errors, initial=plan.pad(state), states=states, end=end,
        HAS_INITIAL=state is not None, HAS_END=end is not None,
    )  # fmt: skip
    return inverse, reading, errors, states


def _d_states(
    plan: _Plan, reading: Tensor, d_end: Tensor | None, has_initial: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the state after every chunk, of what is written, and of the initial state."""
    d_written, kernel = plan.kept_rows(plan.value_width), triton_backward.chunk_d_written
    plan.launch(kernel, plan.by_value(kernel, plan.kv_heads), d_written=d_written)
    d_states, kernel = plan.new_states(plan.chunks), triton_backward.chunk_d_states
    d_initial = plan.new_state() if has_initial else None
    plan.launch(
        kernel, _by_sequence(plan, kernel),
        reading=reading, d_written=d_written, d_end=plan.pad(d_end), d_states=d_states,
        d_initial=d_initial, HAS_END=d_end is not None, HAS_INITIAL=has_initial,
    )  # fmt: skip
    return d_states, d_written, d_initial


def _by_sequence(plan: _Plan, kernel: Any) -> tuple[int]:
    """A grid of programs that go along whole sequences, with all channels of the keys."""
    return (plan.count * plan.kv_heads * plan.blocks(kernel)[1],)
