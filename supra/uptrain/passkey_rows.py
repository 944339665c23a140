"""Rows that hide passkeys, to train on."""

from collections.abc import Iterator
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from supra.data.packing import Block, Row
from supra.data.passkey import passkey_document


class PasskeyRows:
    """The endless rows of one lane (see `Lanes`). Each row is one text, which hides passkeys and
    asks for one of them at its end. Texts are as long as the rows of their stage.

    A lane has every `world`-th row of the run, from number `rank` on. A row depends only on `seed`
    and its number. The position is how many rows were given.
    """

    found = True  # whether a loaded position was found: any row can be made again

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        *,
        keys: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        segments: int | None = None,
        setting: str = "data.sequence_length",  # in messages, like name
        name: str = "the data",
    ):
        self.tokenizer, self.keys, self.seed, self.name = tokenizer, keys, seed, name
        self.rank, self.world, self.rows = rank, world, 0
        self.cut(sequence_length, segments, setting)

    @property
    def block_tokens(self) -> int:
        return self.sequence_length * (self.segments or 1)

    def cut(self, sequence_length: int, segments: int | None, setting: str) -> None:
        """From here on, give rows of this size; see `BlockStream.cut`. Raises UserError when they
        have no room for the passkeys."""
        self.sequence_length, self.segments, self.setting = sequence_length, segments, setting
        self._row(0)

    def __iter__(self) -> Iterator[Block]:
        return self

    def __next__(self) -> Block:
        row = self._row(self.rows * self.world + self.rank)
        self.rows += 1
        return row

    def _row(self, number: int) -> Block:
        # evaluations have seeds without the word "training", so that their texts are others
        draw, row = Random(f"training {self.seed} {number}"), Row(self.block_tokens)
        row.add(
            passkey_document(self.tokenizer, self.block_tokens, draw, self.keys, self.setting), 0
        )
        return row.block()

    def state_dict(self) -> dict[str, int]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]

    @property
    def place(self) -> str:
        """The position in words."""
        return f"row {self.rows}"
