"""The rows of a data set that is read while training, from any place on."""

from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Any

import datasets

Place = dict[str, Any]
"""Where a window of rows begins in an epoch, as JSON can hold it: the rows that were taken and read
before it, the part, and where reading was in it."""


class StreamedRows:
    """The rows that one of `world` readers takes of a data set in one epoch, with their places.

    The parts of a data set, mostly files, are read one after the other, in an order that (seed,
    epoch) determines. Rows are shuffled in windows of `window` rows. So reading can go on where a
    window began, without the parts before it. If the readers can have equally many parts, each
    reads its own ones. Otherwise each reads all parts, and takes every `world`-th row.

    seed: None keeps the data set's own order.
    parts: whether parts may be read separately; not if the first rows of the whole are left out.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        *,
        seed: int | None,
        epoch: int,
        window: int,
        rank: int = 0,
        world: int = 1,
        parts: bool = True,
    ):
        self.dataset, self.seed, self.epoch, self.window = dataset, seed, epoch, window
        self.count = dataset.num_shards if parts else 1
        self.own, self.step, self.first = list(range(self.count)), world, rank
        self._shuffle(self.own, "parts")
        if self.count % world == 0:
            self.own, self.step, self.first = self.own[rank::world], 1, 0

    def read(self, place: Place | None = None) -> Iterator[tuple[dict, Place]]:
        """Rows with the places where their windows begin; from a place on, or from the start."""
        place = place or {"taken": 0, "part": 0, "read": 0, "state": None}
        rows = self._rows(place)
        while window := list(islice(rows, self.window)):
            _, part, read, opened = window[-1]
            taken = place["taken"] + len(window)
            after = {"taken": taken, "part": part, "read": read, "state": opened.state_dict()}
            self._shuffle(window, place["taken"])
            for row, *_ in window:
                yield row, place
            place = after

    def _rows(self, place: Place) -> Iterator[tuple[dict, int, int, datasets.IterableDataset]]:
        """The rows that this reader takes, in their own order. With each, the part, the number of
        rows read, and the part as a data set, whose state is where reading is."""
        read, state = place["read"], place["state"]
        for part in range(place["part"], len(self.own)):
            opened = self.dataset.shard(self.count, self.own[part])
            if state is not None:
                opened.load_state_dict(state)
            for row in opened:
                read += 1
                if (read - 1) % self.step == self.first:
                    yield row, part, read, opened
            state = None

    def _shuffle(self, found: list, what: str | int) -> None:
        if self.seed is not None:
            Random(f"{self.seed} {self.epoch} {what}").shuffle(found)
