"""Launches that operations with a decay per key channel share, on the host."""

from typing import Any

import torch
from torch import Tensor

from supra.kernels import channel_decay, channel_gradients, channel_scores
from supra.kernels.launch import Rows, Table, Tiling, pad_width
from supra.kernels.plan import HeadsPlan

# A chunk is one tile and a state is kept for each: with 128 tokens a chunk the forward pass would
# move 11 % fewer bytes, since the sums of logs weigh more than the states, and score two tiles.
TILE, LEVELS = 64, 6

SQUARE, ONE_STAGE = Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 1)
FLOAT32 = {"any float32": ((256, Tiling(32, 32, 4, 2)),)}
FLOAT32_ONE_STAGE = {"any float32": ((256, Tiling(32, 32, 4, 1)),)}

CHANNELS: Table = {
    "decay_sums": {"any": ((256, ONE_STAGE),)},
    "chunk_scores": {"any": ((256, ONE_STAGE),), **FLOAT32_ONE_STAGE},
    "chunk_output": {
        "any": ((256, SQUARE),), "sm_100": ((128, SQUARE), (256, ONE_STAGE)), **FLOAT32,
    },
    "chunk_d_scores": {"any": ((256, SQUARE),), **FLOAT32},
    "chunk_d_query": {"any": ((256, Tiling(32, 64, 4, 1)),), **FLOAT32_ONE_STAGE},
    "chunk_d_key": {
        "any": ((256, Tiling(32, 64, 4, 2)),), "sm_90": ((256, Tiling(32, 64, 4, 1)),),
        **FLOAT32_ONE_STAGE,
    },
}  # fmt: skip


class ChannelPlan(HeadsPlan):
    """With the sums of the decays in every tile, and the decay of the whole tile."""

    def __init__(self, table: Table, x: Any, bonus: Tensor | None = None):
        """x: Inputs with log_decay [B, T, Hkv, K]."""
        super().__init__(table, x, TILE, state_heads=x.key.shape[2])
        log_decay = pad_width(x.log_decay)
        sums = log_decay.new_empty(log_decay.shape, dtype=torch.int32)
        self.whole = self.new_sums(self.chunks, self.kv_heads, self.key_width)
        self.given |= {
            "log_decay": Rows.of(log_decay), "sums": sums,
            "whole": self.whole,
            "bonus": None if bonus is None else pad_width(bonus.float()).contiguous(),
            "HAS_BONUS": bonus is not None, "TILE": TILE, "LEVELS": LEVELS,
        }  # fmt: skip
        kernel = channel_decay.decay_sums
        self.launch(kernel, self.by_key(kernel, self.kv_heads))

    def scores(self) -> Tensor:
        """Scores of the queries, [B, T, Hq, TILE]."""
        scores = self.new_kept(*self.query.shape[:3], TILE)
        kernel = channel_scores.chunk_scores
        self.launch(kernel, (self.chunks, self.heads), heads=self.heads, scores=scores)
        return scores

    def d_written(self, d_written: Tensor, scores: Tensor, d_states: Tensor | None = None) -> None:
        """Fill d_written [B, T, Hkv, V], from the outputs and, if given, the states' gradients."""
        kernel = channel_gradients.chunk_d_written
        self.launch(
            kernel, self.by_value(kernel, self.kv_heads), scores=scores, d_states=d_states,
            d_written=d_written,
        )  # fmt: skip

    def d_scores(self, heads: int, **own: Any) -> Tensor:
        """Gradients of the scores of `heads` heads."""
        d_scores = self.new_kept(*self.query.shape[:2], heads, TILE)
        self.launch(
            channel_gradients.chunk_d_scores, (self.chunks, heads), heads=heads, d_scores=d_scores,
            **({"STRICT": False} | own),
        )  # fmt: skip
        return d_scores

    def d_query(
        self, heads: int, states: Tensor, d_scores: Tensor, d_query: Tensor, **own: Any
    ) -> Tensor:
        """Fill d_query [B, T, heads, K]; its part of the gradient of log_decay, in float32."""
        kernel, d_logs = channel_gradients.chunk_d_query, self.new_sums(*d_query.shape)
        self.launch(
            kernel, self.by_key(kernel, heads), heads=heads, states=states, d_scores=d_scores,
            d_query=d_query, d_logs=d_logs, **({"d_bonus": None, "OF_KEYS": False} | own),
        )  # fmt: skip
        return d_logs

    def d_key(
        self, d_states: Tensor, d_scores: Tensor, d_whole: Tensor, d_logs: Tensor, **own: Any
    ) -> tuple[Tensor, Tensor]:
        """Gradients of key, and of log_decay in float32.

        d_whole: [blocks, chunks, Hkv, K], of the logs of the whole decays, in blocks of channels of
        the values. d_logs: from the queries.
        """
        d_key, kernel = self.key.new_empty(self.key.shape), channel_gradients.chunk_d_key
        d_log_decay = self.new_sums(*d_key.shape)
        of_keys = {"d_reading": None, "d_reading_logs": None} | own
        self.launch(
            kernel, self.by_key(kernel, self.kv_heads), d_states=d_states, d_scores=d_scores,
            d_whole=d_whole, d_query_logs=d_logs, d_key=d_key, d_log_decay=d_log_decay,
            value_blocks=len(d_whole), **of_keys,
        )  # fmt: skip
        return d_key, d_log_decay
