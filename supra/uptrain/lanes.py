"""The rows of a step, which are the same on any number of processes."""

from collections.abc import Callable

from supra.data.packing import Block
from supra.uptrain.data import BlockStream
from supra.uptrain.mixture import Mixture

Stream = BlockStream | Mixture


class Lanes:
    """The endless rows of a run. Each of `readers` processes gets an equal part.

    A run deals its documents to as many lanes as there are processes when it begins, and each lane
    packs its own documents. Every step takes equally many rows of each lane. In the order of lanes,
    the rows are cut into equal parts, one per process. So at the beginning each process reads one
    lane. If the run goes on with another number of processes, its steps have the same rows in the
    same order. A process then reads several lanes, or shares a lane with others; those all pack
    the whole lane.

    open_lane: takes the number of a lane and gives its blocks.
    reader: the number of this process.
    """

    def __init__(
        self, open_lane: Callable[[int], Stream], lanes: int, reader: int = 0, readers: int = 1
    ):
        self.lanes, self.reader, self.readers = lanes, reader, readers
        first, end = reader * lanes // readers, -(-(reader + 1) * lanes // readers)
        self.streams = {lane: open_lane(lane) for lane in range(first, end)}

    def step(self, rows: int) -> list[Block]:
        """This process's part of the next `rows` rows of the run, which all processes ask for.
        `rows` must be divisible by the number of lanes and of processes."""
        first, end = (x * rows // self.readers for x in (self.reader, self.reader + 1))
        each = rows // self.lanes
        found = []
        for lane, stream in self.streams.items():
            read = [next(stream) for _ in range(each)]
            found += read[max(0, first - lane * each) : max(0, end - lane * each)]
        return found

    def cut(self, sequence_length: int, segments: int | None, setting: str) -> None:
        """From here on, give rows of this size; see `BlockStream.cut`."""
        for stream in self.streams.values():
            stream.cut(sequence_length, segments, setting)

    @property
    def own(self) -> dict[int, Stream]:
        """The lanes whose first row is this process's, so that each lane has one owner."""
        owned = (x for x in self.streams if x * self.readers // self.lanes == self.reader)
        return {lane: self.streams[lane] for lane in owned}

    def state_dict(self) -> dict[int, dict]:
        """The positions of the lanes that this process owns."""
        return {lane: stream.state_dict() for lane, stream in self.own.items()}

    def load_state_dict(self, states: dict[int, dict]) -> None:
        """Go to a position in each of `streams`; see `BlockStream.load_state_dict`."""
        for lane, stream in self.streams.items():
            stream.load_state_dict(states[lane])

    @property
    def found(self) -> bool:
        """Whether the text has every position that was loaded."""
        return all(stream.found for stream in self.streams.values())

    @property
    def place(self) -> str:
        """The positions in words."""
        return "; ".join(stream.place for stream in self.streams.values())
