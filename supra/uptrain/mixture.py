"""Rows of several texts, as many of each as its share of the tokens asks for."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from supra.data.packing import Block
from supra.uptrain.data import BlockStream
from supra.uptrain.passkey_rows import PasskeyRows


class Mixture:
    """The endless blocks of one lane (see `Lanes`); each has tokens of one source alone.

    The next block comes from the source that is furthest behind its share of the tokens, so that
    the tokens of a source never differ from its share by more than about two blocks. Every lane
    starts elsewhere in this order, by the seed and its number `rank`. Otherwise, all lanes would
    read the same source in the same step.

    The position says how many tokens each source has given, and where its own blocks go on.
    """

    def __init__(
        self,
        streams: Sequence[BlockStream | PasskeyRows],
        shares: Sequence[float],
        *,
        seed: int | None = None,  # None: the first source comes first
        rank: int = 0,
    ):
        self.streams, self.shares = list(streams), list(shares)
        self.tokens = [0] * len(self.streams)
        # how many blocks each source is ahead of its share at the start
        self.ahead = [0.0] * len(self.streams)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed + rank)
            self.ahead = torch.rand(len(self.streams), generator=generator).tolist()

    def __iter__(self) -> Iterator[Block]:
        return self

    def __next__(self) -> Block:
        size = self.streams[0].block_tokens
        total = sum(self.tokens) + size
        behind = [
            share * total - tokens - ahead * size
            for share, tokens, ahead in zip(self.shares, self.tokens, self.ahead, strict=True)
        ]
        index = behind.index(max(behind))
        self.tokens[index] += size
        return next(self.streams[index])

    def state_dict(self) -> dict[str, list[dict[str, int]]]:
        positions = zip(self.tokens, self.streams, strict=True)
        return {"sources": [{"tokens": n, **stream.state_dict()} for n, stream in positions]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; see `BlockStream.load_state_dict`."""
        for index, position in enumerate(state["sources"]):
            self.tokens[index] = position["tokens"]
            self.streams[index].load_state_dict(position)

    @property
    def found(self) -> bool:
        """Whether every source has the position that was loaded."""
        return all(stream.found for stream in self.streams)

    @property
    def place(self) -> str:
        """The position in words."""
        return "; ".join(f"{stream.place} of {stream.name}" for stream in self.streams)

    def cut(self, sequence_length: int, segments: int | None, setting: str) -> None:
        """From here on, give blocks of this size; see `BlockStream.cut`."""
        for stream in self.streams:
            stream.cut(sequence_length, segments, setting)
