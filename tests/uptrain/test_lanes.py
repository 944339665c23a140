"""The rows of a step are the same on any number of processes, also when the number changes."""

import json
import random
from collections import Counter

import datasets
import pytest
import torch

from supra import testing
from supra.data.text import Documents
from supra.uptrain.data import BlockStream
from supra.uptrain.lanes import Lanes
from supra.uptrain.mixture import Mixture

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return testing.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts(letters, count):
    """Texts of different lengths, some of them longer than a row."""
    generator = random.Random(0)
    return ["".join(generator.choices(letters, k=generator.randint(0, 40))) for _ in range(count)]


def rows_of_a_letter_each(count):
    """Texts that fill a row, each with a letter of its own."""
    return [chr(65 + number) * (LENGTH - 1) for number in range(count)]


def opened(tokenizer, documents, lanes, reader=0, readers=1, *, streaming=False, segments=None):
    """The rows of a run; of a mixture, if there are several lists of documents."""

    def open_lane(lane):
        streams = []
        for number, found in enumerate(documents):
            dataset = datasets.Dataset.from_dict({"text": found})
            dataset = dataset.to_iterable_dataset() if streaming else dataset
            options = {"rank": lane, "world": lanes, "segments": segments, "name": str(number)}
            documents_of = Documents(dataset, "text", 0, 8)
            streams.append(BlockStream(documents_of, tokenizer, LENGTH, **options))
        return streams[0] if len(streams) == 1 else Mixture(streams, [0.7, 0.3], seed=0, rank=lane)

    return Lanes(open_lane, lanes, reader, readers)


def steps_on(processes, count, rows, states=None):
    """The rows of some steps on several processes, and the positions after them."""
    for one in processes if states else ():
        one.load_state_dict(states)
    found = [[row for one in processes for row in one.step(rows)] for _ in range(count)]
    saved = {lane: x for one in processes for lane, x in one.state_dict().items()}
    assert len(saved) == sum(len(one.own) for one in processes) == processes[0].lanes
    return found, json.loads(json.dumps(saved), object_hook=with_numbers)


def with_numbers(found):
    return {int(key) if key.isdigit() else key: x for key, x in found.items()}


KINDS = {
    "one text": {"documents": [texts("abc", 50)]},
    "mixture": {"documents": [texts("abc", 40), texts("xyz", 30)]},
    "streaming": {"documents": [texts("abc", 30)], "streaming": True},
    "segments": {"documents": [texts("abc", 90)], "segments": 2},
}


@pytest.mark.parametrize("numbers", [(2, 4, 1), (1, 4, 2), (3, 2, 6), (4, 3, 12)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_other_numbers_of_processes_read_the_same_rows(tokenizer, kind, numbers):
    lanes, rows, states, found = numbers[0], 12, None, []
    for readers in numbers:
        processes = [
            opened(tokenizer, lanes=lanes, reader=reader, readers=readers, **KINDS[kind])
            for reader in range(readers)
        ]
        read, states = steps_on(processes, 3, rows, states)
        found += read
    unbroken = [opened(tokenizer, lanes=lanes, reader=x, readers=lanes, **KINDS[kind])
                for x in range(lanes)]  # fmt: skip
    expected, at_the_end = steps_on(unbroken, 9, rows)
    assert states == at_the_end
    for step, same in zip(found, expected, strict=True):
        for row, other in zip(step, same, strict=True):
            assert all(torch.equal(row[name], other[name]) for name in other)


def test_each_document_is_read_once(tokenizer):
    """On two, then four, then one process; the next epoch begins after the last document."""
    documents, states, found = rows_of_a_letter_each(24), None, []
    for readers in (2, 4, 1):
        processes = [opened(tokenizer, [documents], 2, x, readers) for x in range(readers)]
        read, states = steps_on(processes, 2, 4, states)
        found += [tokenizer.decode(row["input_ids"]) for step in read for row in step]
    assert Counter(x.removesuffix("<|endoftext|>") for x in found) == Counter(documents)
    assert {state["documents"] for state in states.values()} == {12}


def test_a_process_reads_its_own_lanes_alone(tokenizer):
    eight = [opened(tokenizer, [texts("abc", 50)], 4, x, 8) for x in range(8)]
    assert [list(x.streams) for x in eight] == [[n // 2] for n in range(8)]
    two = [opened(tokenizer, [texts("abc", 50)], 4, x, 2) for x in range(2)]
    assert [list(x.streams) for x in two] == [[0, 1], [2, 3]]
