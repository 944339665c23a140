"""Chats: the tokens of apply_chat_template, labels for the assistant's tokens alone, refusals."""

import json

import datasets
import pytest
import torch

from supra.data.chat import chat_document, read_document
from supra.data.packing import IGNORE, pack
from supra.data.text import Documents, open_dataset
from supra.errors import UserError
from supra.uptrain.data import BlockStream
from tests.data.templates import (
    CHATML,
    FORGETFUL,
    LOOP,
    MARKED,
    TEMPLATES,
    chat_tokenizer,
    chats,
)

CHAT = [
    {"role": "user", "content": "What rises?"},
    {"role": "assistant", "content": "The river."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "It falls."},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        (name, start): chat_tokenizer(folder / f"{number}{start}", template, start)
        for number, (name, template) in enumerate(TEMPLATES.items())
        for start in ("", "<bos>")
    }


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("start", ["", "<bos>"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_what_apply_chat_template_gives(tokenizers, name, start):
    """Token by token; and the labels are the tokens that the assistant writes behind its prompt,
    one by one."""
    tokenizer = tokenizers[name, start]
    for chat in chats(30):
        document = chat_document(tokenizer, chat)
        expected = tokenizer.apply_chat_template(chat)["input_ids"]
        assert [*document.start, *document.tokens] == expected
        assert document.start == ([1] if start and "bos" in TEMPLATES[name] else [])
        said = [x for x in document.labels if x != IGNORE]
        assert all(
            label in (IGNORE, token)
            for label, token in zip(document.labels, document.tokens, strict=True)
        )
        answers = "".join(spoken(tokenizer, chat))
        if name != "no special tokens":  # whose prompt and answer share a token, " the" say
            assert tokenizer.decode(said) == answers


def spoken(tokenizer, chat):
    """What the template writes behind the prompt for each answer, from its rendered text."""
    for index in range(1, len(chat), 2):
        before = tokenizer.apply_chat_template(
            chat[:index], add_generation_prompt=True, tokenize=False
        )
        yield tokenizer.apply_chat_template(chat[: index + 1], tokenize=False)[len(before) :]


def test_labels_are_those_of_the_same_template_with_markers(tokenizers):
    plain, marked = tokenizers["chatml", ""], tokenizers["markers", ""]
    for chat in chats(30, seed=1):
        assert chat_document(plain, chat) == chat_document(marked, chat)


def test_labels_of_a_chat(tokenizers):
    tokenizer = tokenizers["a default system prompt", ""]
    document = chat_document(tokenizer, CHAT)
    said = tokenizer.decode([x for x in document.labels if x != IGNORE])
    assert said == "The river.<|im_end|>\nIt falls.<|im_end|>\n"
    first = document.labels.index(document.tokens[-2])  # the first <|im_end|> of an answer
    assert IGNORE in document.labels[first + 2 :], "a question between the answers"


def test_a_token_that_is_partly_the_templates_is_not_trained_on(tokenizers):
    """Behind "assistant:", an answer that begins with a space shares its first token with it."""
    template = LOOP + "{{ message['content'] }}{% endfor %}"
    tokenizer = tokenizers["chatml", ""]
    question, answer = "in the hi", "lls and runs"
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", template)
        document = chat_document(tokenizer, chat)
    pieces = [tokenizer.decode([x]) for x in document.tokens]
    length, shared = 0, None
    for index, piece in enumerate(pieces):
        if length < len(question) < length + len(piece):
            shared = index
        length += len(piece)
    assert shared is not None, f"no token across the border: {pieces}"
    assert document.labels[shared] == IGNORE and document.labels[shared + 1] != IGNORE


@pytest.mark.parametrize(
    "chat",
    [
        CHAT[:1],
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "assistant", "content": "Hello!"}],
    ],
)
def test_a_chat_without_an_answer_is_no_document(tokenizers, chat):
    assert chat_document(tokenizers["chatml", ""], chat).tokens == ()


def test_a_first_message_by_the_assistant_is_read_and_not_trained_on(tokenizers):
    tokenizer = tokenizers["chatml", ""]
    chat = [{"role": "assistant", "content": "Hello!"}, *CHAT]
    document = chat_document(tokenizer, chat)
    assert list(document.tokens) == tokenizer.apply_chat_template(chat)["input_ids"]
    said = tokenizer.decode([x for x in document.labels if x != IGNORE])
    assert said == "The river.<|im_end|>\nIt falls.<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (FORGETFUL, CHAT, "4 messages looks different when more messages follow, up to message 2"),
        (
            "{{ messages | length }}" + CHATML,
            CHAT[:2],
            "looks different before the answer is there, up to message 2 .'1<.* instead of '2<",
        ),
        (
            LOOP + "{{ message['content'][:1] if loop.last else message['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'a long prompt' }}{% endif %}",
            CHAT[:2],
            "looks different before the answer is there",
        ),
        ("{{ raise_exception('no chats here') }}", CHAT, "TemplateError: no chats here"),
        ("{% for x in %}", CHAT, "does not work on a chat of the text: TemplateSyntaxError"),
        (None, CHAT, "the tokenizer has no chat template: give text, or set chat_template"),
    ],
)
def test_a_template_that_does_not_show_the_answers_is_refused(
    tokenizers, monkeypatch, template, chat, message
):
    tokenizer = tokenizers["chatml", ""]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=message):
        chat_document(tokenizer, chat)


def test_a_forgetful_template_takes_chats_of_one_answer(tokenizers, monkeypatch):
    tokenizer = tokenizers["chatml", ""]
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL)
    said = [x for x in chat_document(tokenizer, CHAT[:2]).labels if x != IGNORE]
    assert tokenizer.decode(said) == "(thinking)\nThe river.<|im_end|>\n"


def test_keys_without_a_value_are_left_out(tokenizers, monkeypatch):
    """A data set gives every message the keys that any message has."""
    tokenizer = tokenizers["chatml", ""]
    template = LOOP + "{{ message['content'] }}{% if message.tool_calls is defined %}!{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template + "{% endfor %}")
    chat = [message | {"tool_calls": None} for message in CHAT]
    assert chat_document(tokenizer, chat[:2]) == chat_document(tokenizer, CHAT[:2])


def test_chats_are_packed(tokenizers):
    """Pieces that go on in the next row begin with the start token that the template spells out."""
    tokenizer = tokenizers["bos, trimmed", "<bos>"]
    documents = [read_document(tokenizer, x) for x in ("A river.", *chats(6))]
    whole = [token for x in documents for token in x.tokens]
    labels = [label for x in documents for label in x.labels]
    found, kept = [], []
    for block in pack(documents, 17):
        begins = (block["position_ids"] == 0).nonzero().flatten().tolist()
        assert all(block["input_ids"][begin] == 1 for begin in begins)
        text = [n for n in range(17) if n not in begins]
        found += block["input_ids"][text].tolist()
        kept += block["labels"][text].tolist()
    assert found == whole[: len(found)] and len(found) > 100
    # what is not predicted is the assistant's first token in a row that goes on, and nothing else
    lost = [n for n, label in enumerate(kept) if label != labels[n]]
    assert all(kept[n] == IGNORE for n in lost) and len(lost) <= len(kept) // 16


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_records_of_chats(tokenizers, tmp_path, streaming):
    """In the field messages, where there is no field of the text, or in the field that is named."""
    all_chats = list(chats(5))
    all_chats[2] = [*all_chats[2], {"role": "user", "content": "?", "name": "a"}]
    rows = [{"messages": x} for x in all_chats]
    files = {
        "messages": write(tmp_path / "a.jsonl", [*rows, {"messages": None}, {"messages": []}]),
        "talk": write(tmp_path / "b.jsonl", [{"talk": x["messages"]} for x in rows]),
        "text": write(tmp_path / "c.jsonl", [{"text": "one", **x} for x in rows]),
    }

    def read(name, field, **options):
        dataset = open_dataset(files[name], streaming=streaming)
        return list(Documents(dataset, field, source=files[name], **options).epoch(0))

    def plain(found):
        return [[{k: v for k, v in y.items() if v is not None} for y in x] for x in found]

    found = read("messages", "text", chats=True)
    assert plain(found[:5]) == all_chats and found[5:] == ["", ""]
    assert plain(read("talk", "talk", chats=True)) == all_chats
    assert read("text", "text", chats=True) == ["one"] * 5
    assert plain(read("text", "messages", chats=True)) == all_chats
    with pytest.raises(UserError, match="text field 'text' is not in the data: its fields are"):
        read("messages", "text")
    with pytest.raises(UserError, match=r"text field 'talk' holds .*, not text"):
        read("talk", "talk")


@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize("value", [["a"], [{"content": "a"}], [{"role": 7}], 7, {"role": "user"}])
def test_what_is_no_chat_is_refused(tmp_path, value):
    path = write(tmp_path / "a.jsonl", [{"text": value}])
    with pytest.raises(UserError, match=r"text field 'text' holds .*"):
        list(Documents(open_dataset(path), "text", source=path, chats=True).epoch(0))


@pytest.mark.parametrize("segments", [None, 2])
def test_resume_is_exact_in_chats(tokenizers, segments):
    tokenizer = tokenizers["bos, trimmed", "<bos>"]
    dataset = datasets.Dataset.from_list([{"messages": x} for x in chats(9)])

    def make():
        documents = Documents(dataset, "text", 0, chats=True)
        return BlockStream(documents, tokenizer, 16, segments=segments)

    unbroken, states, blocks = make(), [], []
    for _ in range(25):
        states.append(unbroken.state_dict())
        blocks.append(next(unbroken))
    for state, block in zip(states, blocks, strict=True):
        resumed = make()
        resumed.load_state_dict(state)
        found = next(resumed)
        assert all(torch.equal(found[x], block[x]) for x in block)


def test_markers_are_found_however_they_are_written(tokenizers, monkeypatch):
    tokenizer = tokenizers["markers", ""]
    expected = chat_document(tokenizer, CHAT)
    written = MARKED.replace("{% generation", "{%-generation")
    monkeypatch.setattr(tokenizer, "chat_template", written)
    assert chat_document(tokenizer, CHAT) == expected
