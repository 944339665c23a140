"""Launches that operations with the delta rule share, on the host.

A plan is a HeadsPlan with chunks of CHUNK tokens. It is given beta in float32, and PER_HEAD or
PER_CHANNEL.
"""

from typing import Any

import torch
from torch import Tensor

from supra.kernels import delta_backward, delta_forward
from supra.kernels.launch import Rows, Table, Tiling
from supra.kernels.plan import HeadsPlan

# T is as wide as its chunk: with 128 tokens a token would cost 5 times the work to invert it, in
# tiles that no longer fit the registers, to halve the bytes of the states, which up to heads of 128
# are fewer than those of W, e and T.
CHUNK = 64

SQUARE, FLOAT32 = Tiling(64, 64, 4, 2), ((256, Tiling(32, 32, 4, 1)),)

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

DELTA: Table = {
    "chunk_solve": {"any": ((256, SQUARE),), "any float32": FLOAT32},
    "chunk_states": SCANS | {"sm_100": SCANS_100},
    "chunk_d_states": SCANS | {"sm_100": D_SCANS_100},
    "chunk_d_value": {"any": ((256, SQUARE),), "any float32": FLOAT32},
}


# arguments of kernels: those of the other kind of decay are absent
PER_HEAD = {"whole": None, "LEVELS": 0, "CHANNELS": False}
PER_CHANNEL = {"CHANNELS": True, "HAS_DECAY": False}


def new_rows(plan: HeadsPlan, width: int) -> Tensor:
    """Room for what one kernel leaves for another, [B, T, Hkv, width]."""
    return plan.new_kept(*plan.key.shape[:3], width)


def _invert(plan: HeadsPlan) -> Tensor:
    """T [B, T, Hkv, CHUNK]."""
    inverse, precision = new_rows(plan, CHUNK), plan.precision
    plan.launch(
        delta_forward.chunk_inverse, (plan.chunks, plan.kv_heads), inverse=inverse,
        SOLVE=precision if precision == "tf32x3" else "tf32",
    )  # fmt: skip
    return inverse


def _solve(plan: HeadsPlan, inverse: Tensor, x: Tensor, decayed: bool = False) -> Tensor:
    """T x; decayed: T (exp(G) x), with a decay per head."""
    kernel, width = delta_forward.chunk_solve, x.shape[3]
    keys, found = x is not plan.value, new_rows(plan, width)
    grid, cut = plan.by_key if keys else plan.by_value, plan.tiling(kernel)
    plan.launch(
        kernel, grid(kernel, plan.kv_heads), inverse=inverse, x=Rows.of(x), found=found,
        WIDTH=width, BLOCK=cut.key if keys else cut.value, DECAYED=decayed,
    )  # fmt: skip
    return found


def states(
    plan: HeadsPlan,
    keys: Tensor,
    state: Tensor | None,
    end: Tensor | None,
    *,
    decayed: bool = False,
    **own: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T, W, the errors, and the states before every chunk and after the last.

    keys: with the decay since their chunk began, or `decayed` by the kernel. end: what the last
    states are written to.
    """
    inverse = _invert(plan)
    reading, errors = _solve(plan, inverse, keys, decayed), _solve(plan, inverse, plan.value)
    states, kernel = plan.new_states(plan.chunks + plan.count), delta_forward.chunk_states
    plan.launch(
        kernel, _by_sequence(plan, kernel),
        reading=reading, errors=errors, initial=plan.pad(state), states=states, end=end, **own,
    )  # fmt: skip
    return inverse, reading, errors, states


def scan_back(
    plan: HeadsPlan,
    reading: Tensor,
    d_written: Tensor,
    d_end: Tensor | None,
    has_initial: bool,
    **own: Any,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the state after every chunk and of the initial one; d_written is completed."""
    d_states, kernel = plan.new_states(plan.chunks), delta_backward.chunk_d_states
    d_initial = plan.new_state() if has_initial else None
    plan.launch(
        kernel, _by_sequence(plan, kernel),
        reading=reading, d_written=d_written, d_end=plan.pad(d_end), d_states=d_states,
        d_initial=d_initial, **own,
    )  # fmt: skip
    return d_states, d_initial


def d_values(
    plan: HeadsPlan, inverse: Tensor, errors: Tensor, d_written: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of value [B, T, Hkv, V] and of beta [B, T, Hkv]."""
    d_value, kernel = torch.empty_like(errors), delta_backward.chunk_d_value
    d_beta = plan.new_sums(plan.blocks(kernel)[1], plan.kv_heads, plan.total)
    plan.launch(
        kernel, plan.by_value(kernel, plan.kv_heads),
        inverse=inverse, errors=errors, d_written=d_written, d_value=d_value, d_beta=d_beta,
    )  # fmt: skip
    return d_value, d_beta.sum(0).T.reshape(plan.key.shape[:3])


def _by_sequence(plan: HeadsPlan, kernel: Any) -> tuple[int]:
    """A grid of programs that go along whole sequences, with all channels of the keys."""
    return (plan.count * plan.kv_heads * plan.blocks(kernel)[1],)
