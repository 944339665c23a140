"""Kimi Delta Attention on GPUs: the host side of the Triton kernels.

The keys read what was written before them as queries do, so the kernels of queries are launched
with keys in their place too.
"""

import torch
from torch import Tensor

from supra.kernels import delta_plan
from supra.kernels.channel_plan import CHANNELS, FLOAT32_ONE_STAGE, ONE_STAGE, SQUARE, ChannelPlan
from supra.kernels.channel_scores import chunk_output
from supra.kernels.delta import Inputs
from supra.kernels.delta_plan import DELTA
from supra.kernels.kda import triton_kernels
from supra.kernels.launch import Rows, Table, Tiling
from supra.kernels.plan import narrow, narrow_heads
from supra.kernels.recurrent import decode

NARROW, UP_TO_128 = (32, Tiling(32, 32, 4, 1)), (128, Tiling(128, 32, 4, 1))

TILINGS: Table = (
    CHANNELS
    | DELTA
    | {
        "chunk_decayed": {"any": ((256, ONE_STAGE),)},
        "chunk_inverse": {"any": ((256, ONE_STAGE),), **FLOAT32_ONE_STAGE},
        "chunk_d_written": {"any": ((256, SQUARE),), **FLOAT32_ONE_STAGE},
        "chunk_d_whole": {"any": ((256, ONE_STAGE),)},
        # more stages or fewer warps would spill there
        "chunk_states": DELTA["chunk_states"]
        | {"sm_100": (NARROW, (128, Tiling(128, 32, 4, 2)), (256, Tiling(128, 16, 4, 3)))},
        "chunk_d_states": DELTA["chunk_d_states"]
        | {
            "sm_80": (NARROW, UP_TO_128, (256, Tiling(128, 32, 8, 1))),
            "small": (NARROW, UP_TO_128, (256, Tiling(128, 16, 4, 1))),
        },
        "chunk_d_query": CHANNELS["chunk_d_query"]
        | {"sm_90": ((32, Tiling(32, 64, 8, 1)), (256, Tiling(32, 64, 4, 1)))},
        "chunk_d_key": CHANNELS["chunk_d_key"] | {"sm_100": ((256, Tiling(32, 64, 4, 1)),)},
    }
)


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and final state; the kernels choose their chunks."""
    plan, kernel = _Plan(x), chunk_output
    end, output = plan.new_state(), plan.new_output()
    _, _, errors, states = plan.states(x.state, end)
    plan.launch(
        kernel, plan.by_value(kernel, plan.heads), heads=plan.heads, value=plan.written(errors),
        states=states, scores=plan.scores(), output=output,
    )  # fmt: skip
    return narrow(output, x.value), plan.unpad(end)


def backward(x: Inputs, d_output: Tensor, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors; T, the states and the scores are computed again."""
    plan = _Plan(x)
    plan.add_d_output(d_output)
    inverse, reading, errors, states = plan.states(x.state)
    d_written = delta_plan.new_rows(plan, plan.value_width)
    plan.d_written(d_written, plan.scores())
    d_states, d_start = delta_plan.scan_back(
        plan, reading, d_written, d_end, x.state is not None, key=plan.departing,
        query=Rows.of(plan.decayed(plan.query, entering=True)),
    )  # fmt: skip
    d_value, d_beta = delta_plan.d_values(plan, inverse, errors, d_written)
    del inverse, reading, d_written

    written = plan.written(errors)
    d_scores = plan.d_scores(plan.heads, value=written)
    d_query = plan.query.new_empty(plan.query.shape)
    d_logs = plan.d_query(plan.heads, states, d_scores, d_query)
    # the keys in the place of queries, with the gradient -dv of what they read
    as_query = {"query": Rows.of(plan.key), "d_output": Rows.of(d_value)}
    as_query |= {"scale": -1.0, "QUERIES": 1}
    d_overlap = plan.d_scores(plan.kv_heads, value=written, **as_query, STRICT=True)
    d_reading = plan.new_sums(*plan.key.shape)
    d_reading_logs = plan.d_query(
        plan.kv_heads, states, d_overlap, d_reading, **as_query, OF_KEYS=True
    )
    d_key, d_log_decay = plan.d_key(
        d_states, d_scores, plan.d_whole(states, d_states), d_logs, value=written,
        d_reading=d_reading, d_reading_logs=d_reading_logs,
    )  # fmt: skip
    return (
        *narrow_heads(x, d_query, d_key, d_value),
        d_beta.to(x.beta.dtype),
        narrow(d_log_decay, x.log_decay),
        plan.unpad(d_start),
    )


def recurrent(x: Inputs) -> Tensor:
    """Output of the recurrence token by token; the state is updated in place."""
    return decode(x, x.key.shape[2], x.state, beta=Rows.of(x.beta))


class _Plan(ChannelPlan):
    """With the strengths of writing, and the keys with the decay to the end of their chunk."""

    def __init__(self, x: Inputs):
        super().__init__(TILINGS, x)
        self.given |= {"beta": Rows.of(x.beta.float()), **delta_plan.PER_CHANNEL}
        self.departing = Rows.of(self.decayed(self.key, entering=False))

    def decayed(self, x: Tensor, *, entering: bool) -> Tensor:
        """Queries or keys with the decay since their chunk began, or until it ends."""
        found, heads = self.new_kept(*x.shape), x.shape[2]
        kernel = triton_kernels.chunk_decayed
        self.launch(
            kernel, self.by_key(kernel, heads), heads=heads, QUERIES=heads // self.kv_heads,
            x=Rows.of(x), found=found, ENTERING=entering,
        )  # fmt: skip
        return found

    def states(
        self, state: Tensor | None, end: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """T, W, the errors, and the states before every chunk and after the last."""
        key = self.decayed(self.key, entering=True)
        return delta_plan.states(self, key, state, end, key=self.departing)

    def d_whole(self, states: Tensor, d_states: Tensor) -> Tensor:
        """Gradient of the logs of the chunks' whole decays, [1, chunks, Hkv, K]."""
        found, kernel = self.new_sums(1, *self.whole.shape), triton_kernels.chunk_d_whole
        self.launch(
            kernel, self.by_key(kernel, self.kv_heads),
            states=states, d_states=d_states, d_whole=found,
        )  # fmt: skip
        return found

    def written(self, errors: Tensor) -> Rows:
        """What the tokens write, in the place of the values."""
        beta = self.given["beta"].data[..., None]
        return Rows.of(torch.mul(errors, beta, out=torch.empty_like(errors)))
