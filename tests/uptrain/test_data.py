"""Packing, and the stream of blocks: boundaries, determinism, exact resume, errors."""

import gzip
import json
import random
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
import torch

from supra import testing
from supra.data.packing import encode, pack
from supra.data.text import hub_name
from supra.errors import UserError
from supra.uptrain import tree
from supra.uptrain.data import (
    BlockStream,
    Documents,
    held_out_blocks,
    open_dataset,
    training_documents,
)
from tests.data.documents import whole

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return testing.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts(count, seed=0):
    generator = random.Random(seed)
    return [f"document {i} " + "word " * generator.randint(0, 12) for i in range(count)]


def write(path, documents, field="text"):
    lines = "".join(json.dumps({field: text}) + "\n" for text in documents)
    (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(lines)
    return str(path)


def stream(tokenizer, documents, *, streaming=False, seed=0, **options):
    dataset = datasets.Dataset.from_dict({"text": documents})
    if streaming:
        dataset = dataset.to_iterable_dataset()
    return BlockStream(Documents(dataset, "text", seed, 8), tokenizer, LENGTH, **options)


def take(blocks, count):
    return [next(blocks) for _ in range(count)]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_packing():
    blocks = list(pack(whole([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11], [12]]), 4))
    expected = [
        ([1, 2, 3, 4], [0, 1, 2, 0], [-100, 2, 3, -100]),
        ([5, 6, 7, 8], [0, 0, 1, 2], [-100, -100, 7, 8]),
        ([9, 10, 11, 12], [0, 1, 2, 0], [-100, 10, 11, -100]),
    ]
    found = [
        tuple(block[name].tolist() for name in ("input_ids", "position_ids", "labels"))
        for block in blocks
    ]
    assert found == expected


def test_an_incomplete_block_is_dropped():
    assert [block["input_ids"].tolist() for block in pack(whole([[1, 2, 3], [4, 5]]), 2)] == [
        [1, 2],
        [3, 4],
    ]


def test_documents_end_with_eos_and_have_no_special_tokens(tokenizer):
    tokens = encode(tokenizer, "The river runs.")
    assert tokenizer.decode(tokens) == "The river runs.<|endoftext|>"
    assert encode(tokenizer, " \n\t") == []


def test_stream_is_pack_without_shuffling(tokenizer):
    documents = ["", *texts(9), "  "]
    encoded = [encode(tokenizer, text) for text in documents * 3]
    expected = list(pack(whole(encoded), LENGTH))
    assert_same(take(stream(tokenizer, documents, seed=None), len(expected)), expected)


def test_epochs_are_shuffled_anew_and_complete(tokenizer):
    source = stream(tokenizer, texts(20)).source
    first, second = list(source.epoch(0)), list(source.epoch(1))
    assert first != second and sorted(first) == sorted(second) == sorted(texts(20))
    assert first == list(source.epoch(0))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_exact_at_every_block(tokenizer, streaming, world):
    def make():
        options = {"streaming": streaming, "rank": world - 1, "world": world}
        return stream(tokenizer, ["", *texts(9)], **options)

    unbroken = make()
    states, blocks = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(unbroken.state_dict())))
        blocks.append(next(unbroken))
    assert states[-1]["epoch"] >= 1, "the grid must pass the end of an epoch"
    for index in range(0, len(states)):
        resumed = make()
        resumed.load_state_dict(states[index])
        assert resumed.state_dict() == states[index]
        rest = blocks[index : index + 3]
        assert_same(take(resumed, len(rest)), rest)


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_tokenized_ahead(tokenizer, streaming):
    """By threads; blocks and positions are the same, also from the middle on."""
    alone = stream(tokenizer, texts(40), streaming=streaming)
    with ThreadPoolExecutor(2) as pool:
        for start in (0, 5):
            found = stream(tokenizer, texts(40), streaming=streaming, executor=pool)
            found.load_state_dict(alone.state_dict())
            for _ in range(start, 40):
                assert_same([next(found)], [next(alone)])
                assert found.state_dict() == alone.state_dict()
            alone = stream(tokenizer, texts(40), streaming=streaming)
            take(alone, 5)


@pytest.mark.parametrize("streaming", [False, True])
def test_processes_share_the_documents(tokenizer, streaming):
    streams = [stream(tokenizer, texts(11), streaming=streaming, rank=x, world=3) for x in range(3)]
    shares = [[x for x, _ in one.source.read(0, one.rank, one.world)] for one in streams]
    assert sorted(text for share in shares for text in share) == sorted(texts(11))


OPENED = []  # the names of parts, when their reading begins


def parts_of_a_stream(names):
    for name in names:
        OPENED.append(name)
        yield from ({"text": f"{name} {n} " + "word " * (n % 5)} for n in range(7))


def streamed(tokenizer, parts, rank=0, world=1, seed=0):
    """Blocks of a stream with parts of 7 documents, shuffled in windows of 3."""
    names = {"names": [f"part{n}" for n in range(parts)]}
    dataset = datasets.IterableDataset.from_generator(parts_of_a_stream, gen_kwargs=names)
    documents = Documents(dataset, "text", seed, 3)
    return BlockStream(documents, tokenizer, LENGTH, rank=rank, world=world)


@pytest.mark.parametrize(("parts", "world"), [(6, 1), (6, 2), (6, 3), (5, 2)])
def test_a_stream_goes_on_without_what_it_has_read(tokenizer, parts, world):
    """Each process reads its own parts, if they can be shared out evenly."""
    read = []
    for rank in range(world):
        OPENED.clear()
        unbroken = streamed(tokenizer, parts, rank, world)
        states, blocks = [], []
        while unbroken.epoch == 0:
            states.append((json.loads(json.dumps(unbroken.state_dict())), OPENED[-1:]))
            blocks.append(next(unbroken))
        own = OPENED[: parts if parts % world else parts // world]
        read += [text for text, _ in unbroken.source.read(0, rank, world)]
        for (state, last), block in list(zip(states, blocks, strict=True))[1::4]:
            OPENED.clear()
            resumed = streamed(tokenizer, parts, rank, world)
            resumed.load_state_dict(state)
            assert OPENED[0] in own[max(0, own.index(*last) - 1) :], "a window before, at most"
            assert resumed.state_dict() == state
            assert_same([next(resumed)], [block])
    assert len(read) == len(set(read)) == 7 * parts


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["", " \n"], "no text in the data: all 2 documents are blank"),
        (["short"], r"sequence_length \(=16\) is longer than the data \(\d+ tokens in 1 documents"),
        ([], "no text in the data"),
    ],
)
def test_not_enough_text(tokenizer, documents, message):
    with pytest.raises(UserError, match=message):
        next(stream(tokenizer, documents))


def test_a_process_without_documents(tokenizer):
    with pytest.raises(UserError, match="no text in the data of process 2 of 2"):
        next(stream(tokenizer, ["word " * 40], rank=1, world=2))


def test_text_field(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", texts(3), field="content")
    documents = Documents(open_dataset(path), "text")
    with pytest.raises(UserError, match=r"text field 'text' is not in .* fields are content"):
        next(documents.epoch(0))


def test_kinds_of_files(tmp_path):
    documents = texts(5)
    write(tmp_path / "a.jsonl", documents)
    write(tmp_path / "b.jsonl.gz", documents)
    datasets.Dataset.from_dict({"text": documents}).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("one\n\ndocument")

    def read(path, **options):
        return [row["text"] for row in open_dataset(str(path), **options)]

    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert read(tmp_path / name) == documents
        assert read(tmp_path / name, streaming=True) == documents
    assert read(tmp_path / "?.jsonl*") == documents * 2
    assert read(tmp_path / "d.txt") == ["one\n\ndocument"]
    with pytest.raises(UserError, match="mixes"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["none.jsonl", "none/*.txt", "./none"])
def test_no_such_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        open_dataset(name)


def test_a_folder_without_text(tmp_path):
    with pytest.raises(UserError, match=r"has no \.jsonl"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "it is empty"),
        ("a.jsonl.gz", gzip.compress(b""), "it is empty"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "fine"}')[:-9], "ended before the end"),
        ("a.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 9, "Error -3 while decompressing"),
        ("a.jsonl.gz", b"no gzip", "Not a gzipped file"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "JSON parse error"),
        ("a.jsonl", bytes(range(256)), "JSON parse error"),
        ("a.txt", bytes(range(256)), "codec can't decode"),
        ("a.parquet", b"PAR1", "Parquet"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_unreadable_files(tmp_path, name, content, reason, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"cannot be read: .*{reason}"):
        dataset = open_dataset(str(tmp_path / name), streaming=streaming)
        list(Documents(dataset, "text").epoch(0))


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", texts(2))
    assert len(open_dataset("~/a.jsonl")) == 2


def with_data(**data):
    values = {"student": "s", "out": "o", "data": data, "tune": {"tokens": 1}}
    return tree.build(values)


def test_local_files_have_no_splits(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", texts(12))
    with pytest.raises(UserError, match=r"split \(='nope'\) is only for data sets on the hub"):
        training_documents(with_data(path=path, split="nope"))
    with pytest.raises(UserError, match=r"split \(='test'\) .*a.jsonl is local"):
        held_out_blocks(with_data(path=path, eval_split="test"), tokenizer)
    config = with_data(path="on/hub", split="nope", eval_path=path, sequence_length=8)
    encoded = [encode(tokenizer, text) for text in texts(12)]
    assert_same(held_out_blocks(config, tokenizer), list(pack(whole(encoded), 8)))


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_documents_are_not_trained_on(tokenizer, tmp_path, streaming):
    path = write(tmp_path / "a.jsonl", texts(12))
    config = with_data(path=path, eval_documents=4, sequence_length=8, streaming=streaming)
    (documents,) = training_documents(config)
    assert sorted(documents.epoch(0)) == sorted(texts(12)[4:])
    encoded = [encode(tokenizer, text) for text in texts(12)[:4]]
    assert_same(held_out_blocks(config, tokenizer), list(pack(whole(encoded), 8)))


def test_everything_held_out(tmp_path):
    path = write(tmp_path / "a.jsonl", texts(2))
    with pytest.raises(UserError, match="leaves nothing to train on"):
        training_documents(with_data(path=path, eval_documents=2))


def test_what_is_of_the_hub(tmp_path):
    """The model card names a hub data set; local files have no hub name."""
    (tmp_path / "text.txt").write_text("a river")
    assert hub_name("valley/tales") == "valley/tales"
    assert hub_name(str(tmp_path)) is None and hub_name(f"{tmp_path}/*.txt") is None
    with pytest.raises(UserError, match=r"name \(='tales'\) is only for data sets on the hub"):
        open_dataset(str(tmp_path), name="tales")
