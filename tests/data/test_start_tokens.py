"""Tokenizers that add tokens to a text: documents, rows, labels and all commands agree on them."""

import json
from itertools import pairwise

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaModel

from supra import testing
from supra.cli import main
from supra.conversion.convert import convert
from supra.data.packing import IGNORE, encode, pack, plain_tokens, start_tokens
from supra.data.text import Documents
from supra.errors import UserError
from supra.evaluate import blocks_from_text, perplexity
from supra.long_context.statistics import effective_remembrance
from supra.long_context.stream import Reader, TokenStream, begun
from supra.uptrain.data import BlockStream
from tests.data.documents import whole
from tests.uptrain.test_loop import assert_same_weights, interrupt_after

EOS = 0
# what the tokenizer puts around a text -> the tokens before a document, and those after it
KINDS = {
    "nothing, though bos_token is set": ("$A", [], [EOS]),
    "start": ("<bos> $A", [1], [EOS]),
    "start and end": ("<bos> $A <end>", [1], [2, EOS]),
    "start and eos": ("<bos> $A <|endoftext|>", [1], [EOS]),
    "eos alone": ("$A <|endoftext|>", [], [EOS]),
    "eos as start": ("<|endoftext|> $A", [EOS], [EOS]),
    "a start of two": ("<mask> <sop> $A", [1, 2], [EOS]),
}
STARTS = {name: kind for name, kind in KINDS.items() if kind[1]}
TEXTS = ["The river rises. " * n for n in (1, 7, 2, 9, 4)] + ["", "In 1843 the bridge. " * 8, " \n"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {x: testing.tiny_tokenizer(folder / x, template) for x, (template, *_) in KINDS.items()}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def documents(seed=None, texts=TEXTS):
    return Documents(datasets.Dataset.from_dict({"text": texts}), "text", seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_has_what_the_tokenizer_puts_around_it(tokenizers, kind):
    tokenizer, (_, start, end) = tokenizers[kind], KINDS[kind]
    assert start_tokens(tokenizer) == start
    plain = plain_tokens(tokenizer, "The river runs.")
    assert encode(tokenizer, "The river runs.") == plain + end
    assert encode(tokenizer, " \n\t") == []
    (row,) = pack(whole([encode(tokenizer, "The river runs.")], start), len(start + plain + end))
    assert row["input_ids"].tolist() == start + plain + end
    written = tokenizer.decode(start) + "The river runs."
    assert encode(tokenizer, written) == plain + end, "a text that brings its start has it once"


def test_a_tokenizer_whose_tokens_change_is_refused(tokenizers, monkeypatch):
    tokenizer = tokenizers["start"]

    def changing(text, add_special_tokens=True, **options):
        return {"input_ids": [7, 8] if add_special_tokens else [9]}

    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, *args, **x: changing(*args, **x))
    with pytest.raises(UserError, match="changes a text's tokens when it adds special tokens"):
        start_tokens(tokenizer)


def test_a_tokenizer_of_few_letters():
    """Its vocabulary has no token for any of the usual probe texts."""
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "r": 2, "i": 3}, []))
    names = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=names)
    letters = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    assert start_tokens(letters) == [0] and encode(letters, "river") == [2, 3, 2, 1]


N = IGNORE
DOCUMENTS = [[11, 12, 13], [14, 15], [16, 17, 18, 19, 20, 21], [22]]
BLOCKS = [  # start tokens, length -> input_ids, position_ids, labels of each block
    ([], 4, [
        ([11, 12, 13, 14], [0, 1, 2, 0], [N, 12, 13, N]),
        ([15, 16, 17, 18], [0, 0, 1, 2], [N, N, 17, 18]),
        ([19, 20, 21, 22], [0, 1, 2, 0], [N, 20, 21, N]),
    ]),
    ([7], 4, [
        ([7, 11, 12, 13], [0, 1, 2, 3], [N, 11, 12, 13]),
        ([7, 14, 15, 7], [0, 1, 2, 0], [N, 14, 15, N]),
        ([7, 16, 17, 18], [0, 1, 2, 3], [N, 16, 17, 18]),
        ([7, 19, 20, 21], [0, 1, 2, 3], [N, N, 20, 21]),
    ]),
    ([7, 8], 6, [
        ([7, 8, 11, 12, 13, 7], [0, 1, 2, 3, 4, 0], [N, N, 11, 12, 13, N]),
        ([7, 8, 14, 15, 7, 8], [0, 1, 2, 3, 0, 1], [N, N, 14, 15, N, N]),
        ([7, 8, 16, 17, 18, 19], [0, 1, 2, 3, 4, 5], [N, N, 16, 17, 18, 19]),
        ([7, 8, 20, 21, 7, 8], [0, 1, 2, 3, 0, 1], [N, N, N, 21, N, N]),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("start", "length", "expected"), BLOCKS)
def test_blocks(start, length, expected):
    columns = ("input_ids", "position_ids", "labels")
    found = [
        [block[x].tolist() for x in columns] for block in pack(whole(DOCUMENTS, start), length)
    ]
    assert found == [list(block) for block in expected]


def test_rows_without_room_for_text_are_refused(tokenizers):
    with pytest.raises(UserError, match=r"sequence_length \(=2\) leaves no room .* at least 3"):
        blocks_from_text(tokenizers["a start of two"], TEXTS, 2)


@pytest.mark.parametrize("segments", [None, 2])
@pytest.mark.parametrize("kind", STARTS)
def test_resume_is_exact_at_every_block(tokenizers, kind, segments):
    def make():
        return BlockStream(documents(0), tokenizers[kind], 16, segments=segments)

    unbroken, states, blocks = make(), [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(unbroken.state_dict())))
        blocks.append(next(unbroken))
    assert states[-1]["epoch"] >= 1, "the grid must pass the end of an epoch"
    for index, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for block in blocks[index : index + 3]:
            found = next(resumed)
            assert all(torch.equal(found[x], block[x]) for x in block)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_is_pack(tokenizers, kind):
    tokenizer, start = tokenizers[kind], KINDS[kind][1]
    blocks = BlockStream(documents(), tokenizer, 16)
    for expected in pack(whole((encode(tokenizer, text) for text in TEXTS * 2), start), 16):
        found = next(blocks)
        assert all(torch.equal(found[x], expected[x]) for x in expected)


@pytest.mark.parametrize("kind", STARTS)
def test_segments_share_one_start(tokenizers, kind):
    tokenizer, start = tokenizers[kind], KINDS[kind][1]
    blocks, size = BlockStream(documents(), tokenizer, 16, segments=2), 32 - len(start)
    for text in TEXTS:
        tokens = encode(tokenizer, text)
        for at in range(0, len(tokens) - size + 1, size):
            row = next(blocks)
            assert row["input_ids"].tolist() == start + tokens[at : at + size]
            assert row["position_ids"].tolist() == list(range(32))


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_the_mean_over_pieces_alone(tokenizers, kind, tmp_path):
    """The first token of a document is predicted from the start tokens; that of a continued piece
    is not."""
    tokenizer, (_, start, _) = tokenizers[kind], KINDS[kind]
    model = testing.tiny_checkpoint(tmp_path)
    blocks, total, count = blocks_from_text(tokenizer, TEXTS, 40), 0.0, 0
    encoded, at = [encode(tokenizer, text) for text in TEXTS if text.strip()], 0
    for block in blocks:
        edges = [*(block["position_ids"] == 0).nonzero().flatten().tolist(), 40]
        for begin, end in pairwise(edges):
            ids = block["input_ids"][begin:end][None]
            assert ids[0, : len(start)].tolist() == start[: ids.shape[1]]
            text = ids[0, len(start) :].tolist()
            assert text == encoded[0][at : at + len(text)]
            labels = ids.clone()
            labels[:, : len(start) + (at > 0 or not start)] = IGNORE
            at += len(text)
            if at == len(encoded[0]):
                encoded, at = encoded[1:], 0
            predicted = (labels[:, 1:] != IGNORE).sum().item()
            if predicted:
                total += model(ids, labels=labels).loss.item() * predicted
                count += predicted
    result = perplexity(model, blocks)
    assert result.tokens == count and result.loss == pytest.approx(total / count, rel=1e-5)


# the long text of `diagnose`


@pytest.mark.parametrize("kind", KINDS)
def test_the_long_text(tokenizers, kind):
    tokenizer, (_, start, end) = tokenizers[kind], KINDS[kind]
    ids, labels = [], []
    for text in TEXTS * 2:
        if text.strip():
            plain = plain_tokens(tokenizer, text)
            ids += [*start, *plain, *end]
            labels += [*[IGNORE] * len(start), *plain, *end]
    stream, found = TokenStream(tokenizer, documents()), []
    for count in (1, 2, 50, len(ids) - 53):
        found.append(stream.take(count))
    assert torch.cat(found, dim=1).tolist() == [ids, labels]


def test_what_is_not_scored():
    """Start tokens and the very first token are not scored, but positions count them."""
    model = testing.untrained_model(testing.tiny_config(), "mamba2").eval()
    text = torch.randint(3, 300, (2, 12))
    text[1] = text[0]
    text[1, [0, 5, 6]] = IGNORE
    whole_at, whole = Reader(model).read(text[0])
    reader, found = Reader(model), []
    for part in text.split([1, 4, 2, 5], dim=1):
        found.append(reader.read(*part))
    at, nats = (torch.cat(x) for x in zip(*found, strict=True))
    kept = [x for x in range(1, 12) if x not in (5, 6)]
    assert at.tolist() == kept and whole_at.tolist() == list(range(1, 12))
    torch.testing.assert_close(nats, whole[[x - 1 for x in kept]])


def test_begun():
    text = torch.tensor([[5, 6, 7], [5, 6, 7]])
    assert begun(text, []).tolist() == text.tolist()
    assert begun(text, [1, 2]).tolist() == [[1, 2, 7], [IGNORE, IGNORE, 7]]
    assert text.tolist() == [[5, 6, 7]] * 2, "not in place"


def test_remembrance_reads_after_the_start():
    model = testing.untrained_model(testing.tiny_config(), "mamba2").eval()
    tokens = torch.randint(3, 300, (40,))
    settings = {"ends": 2, "chunk": 9}
    (found,) = effective_remembrance(model, tokens, [20], start_tokens=[1], **settings)
    with torch.no_grad():
        one = tokens.new_tensor([1])
        texts = torch.cat([one, tokens[1:]]), torch.cat([one, tokens[21:]])
        whole, part = (model(x[None]).logits[0, -2:].softmax(-1) for x in texts)
    assert found == pytest.approx((whole - part).abs().sum(-1).mean().item() / 2, rel=1e-4)


# every command: what a model reads from an empty state begins with the start tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher and a converted model with each of two tokenizers, and text."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("start", "a start of two"):
        testing.tiny_checkpoint(folder / kind / "teacher")
        tokenizer = testing.tiny_tokenizer(folder / kind / "teacher", KINDS[kind][0])
        start = tokenizer.decode(KINDS[kind][1])
        tokenizer.chat_template = start + "{{ messages[0].content }}"
        tokenizer.save_pretrained(folder / kind / "teacher")
        convert(str(folder / kind / "teacher"), folder / kind / "student", mixer="mamba2")
    lines = [json.dumps({"text": f"The river rises {n} times in the hills. " * (1 + n % 5)})
             for n in range(60)]  # fmt: skip
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(UPTRAIN)
    return folder


@pytest.fixture
def beginnings(monkeypatch):
    """The tokens of every piece that a model reads from an empty state."""
    found, forward = [], LlamaModel.forward

    def recorded(self, input_ids=None, attention_mask=None, position_ids=None, **options):
        cache = options.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            rows, tokens = input_ids.shape
            if position_ids is None:
                position_ids = torch.arange(tokens)[None]
            padded = attention_mask is not None and attention_mask.numel() == rows * tokens
            mask = attention_mask.view(rows, tokens) if padded else torch.ones(rows, tokens)
            for ids, at, real in zip(
                input_ids, position_ids.expand(rows, -1), mask.bool(), strict=True
            ):
                ids, at = ids[real], at[real]
                edges = [*(at == 0).nonzero().flatten().tolist(), len(ids)]
                found.extend(ids[a:b].tolist() for a, b in pairwise(edges))
        return forward(self, input_ids, attention_mask, position_ids, **options)

    monkeypatch.setattr(LlamaModel, "forward", recorded)
    return found


COMMANDS = {
    "eval": "eval text --model {student} --text {text} --sequence-length 48 --tokens 500",
    "ablate": "eval ablate --model {student} --text {text} --sequence-length 48 --tokens 500 "
    "--teacher {teacher} --recall-lengths 200",
    "task": "eval task --model {student} --task mqar --lengths 16 --pairs 2 --samples 4",
    "passkey": "eval passkey --model {student} --lengths 260 --depths 2 --samples 1",
    "diagnose": "diagnose {student} --text {text} --to 400 --trained-length 64 --fix auto",
    "convert": "convert --model {teacher} --out {out} --keep-attention auto:0.5 --text {text}",
    "generate": "generate --model {student} --prompt river --max-new-tokens 2",
    "chat": "generate --model {student} --chat --prompt river --max-new-tokens 2",
    "uptrain": "uptrain --config {config} student={student} teacher={teacher} out={out} "
    "data.path={text}",
}
UPTRAIN = """
data: {sequence_length: 24, eval_documents: 5}
batch: {size: 2}
precision: fp32
eval: {tokens: 48}
calibrate: {tokens: 96}
align: {tokens: 96}
distill: {tokens: 96}
extend: {tokens: 192, state_passing: 2}
"""


def run(folder, kind, name, out):
    places = {x: folder / kind / x for x in ("teacher", "student")}
    places |= {"text": folder / "text.jsonl", "config": folder / "config.yaml", "out": out}
    main([word.format(**places) for word in COMMANDS[name].split()])


@pytest.mark.parametrize("kind", ["start", "a start of two"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_reading_begins_with_the_start(folder, tmp_path, beginnings, name, kind):
    run(folder, kind, name, tmp_path / "out")
    start = KINDS[kind][1]
    assert len(beginnings) > 0
    for ids in beginnings:
        assert ids[: len(start)] == start[: len(ids)], name
        assert ids[len(start) :][:1] != start[-1:], "doubled"


def test_an_interrupted_run_is_unbroken(folder, tmp_path, monkeypatch):
    kind = "a start of two"
    run(folder, kind, "uptrain", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(SystemExit):
            run(folder, kind, "uptrain", tmp_path / "broken")
    run(folder, kind, "uptrain", tmp_path / "broken")
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")
