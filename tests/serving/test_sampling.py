"""`supra sample`: what is written, from what, interrupted, and trained on."""

import json

import datasets
import pytest
import torch
from tqdm import tqdm

from supra import testing
from supra.checkpoint.opening import find_checkpoint
from supra.cli import main
from supra.conversion.convert import convert
from supra.data.packing import plain_tokens
from supra.errors import UserError
from supra.serving import sampling
from supra.serving.draft import Draft
from supra.serving.sampling import sample
from supra.serving.writers import ChatWriter, Sampling, TextWriter, Writer
from tests.data.templates import TEMPLATES, chat_tokenizer
from tests.uptrain.test_loop import log

ENDS = [0, 3, *range(100, 130)]  # so many that records of random models end


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A chat model, the same converted, and texts."""
    folder = tmp_path_factory.mktemp("sampling")
    testing.tiny_checkpoint(folder / "teacher")
    chat_tokenizer(folder / "teacher", TEMPLATES["chatml"])
    settings = folder / "teacher" / "generation_config.json"
    # of a hub's model; only the tokens of the end count
    settings.write_text(json.dumps({"eos_token_id": ENDS, "top_k": 1, "do_sample": True}))
    convert(str(folder / "teacher"), folder / "rnn", mixer="mamba2")
    with open(folder / "texts.jsonl", "w") as file:
        for number in range(5):
            print(json.dumps({"text": f"{number} rivers. " * (1 + 3 * (number % 2))}), file=file)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(files, out, model="teacher", tokens=200, **options):
    settings = Sampling(tokens=tokens, **{"batch": 7, "length": 40, **options})
    sample(find_checkpoint(str(files / model)), out, settings)
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


KINDS = {"texts": {}, "prefixes": {"prefix_tokens": 6}, "chats": {"chat": True, "length": 60}}


def options_of(files, kind):
    return KINDS[kind] | ({"prefixes": str(files / "texts.jsonl")} if kind == "prefixes" else {})


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_gives_the_same_file(files, tmp_path, monkeypatch, kind):
    """Also where a line was written in part; and until it is complete, there is no file."""
    options = options_of(files, kind)
    expected = written(files, tmp_path / "whole.jsonl", **options)
    out, draft = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.draft"
    go_on, calls = Writer._go_on, []

    def stopped(writer, *inputs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return go_on(writer, *inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "_go_on", stopped)
        written(files, out, **options)
    assert not out.exists() and len(draft.read_text().splitlines()) >= 2
    with draft.open("a") as file:
        file.write('[[{"text": "half')
    assert written(files, out, **options) == expected
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {x.name for x in tmp_path.glob("*out*")} | {x.name for x in tmp_path.glob(".*")} == {
        "out.jsonl"
    }


def test_there_are_as_many_tokens_as_were_asked_for(files, tmp_path, monkeypatch):
    """Up to the last text, and whatever the number is, the texts are the same."""
    finish, counts = Draft.finish, []

    def counted(draft, tokens):
        counts[:] = [count for _, count in draft.done]
        finish(draft, tokens)

    monkeypatch.setattr(Draft, "finish", counted)
    texts = [x["text"] for x in written(files, tmp_path / "a.jsonl", tokens=200)]
    assert sum(counts[: len(texts)]) >= 200 > sum(counts[: len(texts) - 1])
    assert max(counts) == 40 - 1 and min(counts) < 10, "some texts end at --length, some before"
    assert len(set(texts)) > 5, "the model's own top_k of 1 does not count"
    assert texts[0] != written(files, tmp_path / "c.jsonl", tokens=1, seed=1)[0]["text"]
    more = [x["text"] for x in written(files, tmp_path / "b.jsonl", tokens=300)]
    assert more[: len(texts)] == texts and len(more) > len(texts)


def test_tokens_are_drawn_from_the_models_distribution(files):
    """At a temperature, within top_p, and from nothing else."""
    checkpoint = find_checkpoint(files / "teacher")
    model, settings = checkpoint.model(), Sampling(1, length=3, temperature=0.7, top_p=0.8)
    writer = TextWriter(checkpoint.tokenizer(), settings)
    writer.use(model)
    logits = model(torch.tensor([writer.start])).logits[0, -1].detach()
    p, order = (logits / 0.7).softmax(-1).sort(descending=True)
    kept = p.cumsum(0) - p < 0.8
    expected = torch.zeros_like(p).scatter(0, order[kept], p[kept] / p[kept].sum())
    torch.manual_seed(0)
    with tqdm(disable=True) as bar:
        found = writer._go_on([writer.start] * 4000, bar)
    first = torch.tensor([x.tokens[0] for x in found if x.tokens])
    outside = torch.tensor([n for n in range(300) if n not in ENDS])
    counted = torch.bincount(first, minlength=300)[outside] / 4000
    assert not counted[expected[outside] == 0].any()
    assert (counted - expected[outside]).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_prefixes(files, tmp_path):
    """The beginnings of the texts that are long enough, in order and over again."""
    options = options_of(files, "prefixes")
    found = [x["text"] for x in written(files, tmp_path / "a.jsonl", tokens=300, **options)]
    tokenizer = find_checkpoint(files / "teacher").tokenizer()
    texts = [json.loads(x)["text"] for x in (files / "texts.jsonl").read_text().splitlines()]
    tokens = [plain_tokens(tokenizer, text)[:6] for text in texts]
    beginnings = [tokenizer.decode(x) for x in tokens if len(x) == 6]
    assert len(found) > len(beginnings) > 1
    for number, text in enumerate(found):
        assert text.startswith(beginnings[number % len(beginnings)])


def test_chats(files, tmp_path):
    """Of a converted model: questions of different lengths are padded."""
    for record in written(files, tmp_path / "a.jsonl", "rnn", **KINDS["chats"]):
        (question, answer), (only,) = record["messages"], record
        assert (only, question["role"], answer["role"]) == ("messages", "user", "assistant")
        for words in (question["content"], answer["content"]):
            assert words.strip() == words != "" and "<|im_" not in words


def test_a_chat_begins_where_the_template_has_the_users_words(files):
    tokenizer = find_checkpoint(files / "teacher").tokenizer()
    writer = ChatWriter(tokenizer, Sampling(1, chat=True))
    assert tokenizer.decode(writer.opening) == "<|im_start|>user\n"
    assert writer.ends == {0, 3}, "end of sequence, and what ends a turn"


@pytest.mark.parametrize("chat", [False, True])
def test_a_run_trains_on_it(files, tmp_path, monkeypatch, chat):
    """Both commands as a user types them."""
    monkeypatch.chdir(tmp_path)
    extra = ["--chat"] if chat else []
    sizes = ["--tokens", "150", "--batch", "20", "--length", "40"]
    model = ["--model", str(files / "teacher"), "--out", "own.jsonl"]
    main(["sample", *model, *sizes, *extra])
    config = "distill: {tokens: 64, next_token: 0.1}\nbatch: {size: 2}\nprecision: fp32\n"
    (tmp_path / "config.yaml").write_text(config)
    run = [f"student={files}/rnn", f"teacher={files}/teacher", "out=run", "data.path=own.jsonl"]
    main(["uptrain", "--config", "config.yaml", *run, "data.sequence_length=16"])
    assert len(log(tmp_path / "run", "kl")) == 2


def test_a_model_that_never_ends_its_chats(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "IDLE", 2)
    message = r"ended none of the last 4 records within --length \(=20\) tokens: raise it"
    for _ in range(2):  # the second run goes on, and has no more patience
        with pytest.raises(UserError, match=message):
            written(files, tmp_path / "a.jsonl", batch=2, chat=True, length=20, temperature=1e-9)
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"--temperature \(=0.0\) must be finite and > 0"),
        ({"temperature": float("nan")}, "must be finite and > 0"),
        ({"top_p": 1.5}, r"--top-p \(=1.5\) must be > 0 and <= 1"),
        ({"length": 7}, r"--length \(=7\) must be at least 8 tokens, so >= 8"),
        (
            {"prefixes": "texts", "prefix_tokens": 39},
            r"--length \(=40\) must be at least 8 tokens more than --prefix-tokens, so >= 47",
        ),
        (
            {"prefixes": "texts", "prefix_tokens": 90, "length": 100},
            r"\(=90\): no text of .* has as",
        ),
        ({"prefixes": "texts", "text_field": "body"}, "text field 'body' is not in the data"),
        ({"prefixes": "texts", "chat": True}, "is for texts: leave it out, or leave out --chat"),
        ({"prefixes": "none.jsonl"}, "there is no such file"),
    ],
)
def test_mistakes_are_named(files, tmp_path, options, message):
    if options.get("prefixes") == "texts":
        options = options | {"prefixes": str(files / "texts.jsonl")}
    with pytest.raises(UserError, match=message):
        written(files, tmp_path / "a.jsonl", **options)
    assert not (tmp_path / "a.jsonl").exists()


def test_files_that_are_there(files, tmp_path):
    out, draft = tmp_path / "a.jsonl", tmp_path / ".a.jsonl.draft"
    written(files, out)
    with pytest.raises(UserError, match=r"--out .* exists: name a new file"):
        written(files, out)
    out.rename(tmp_path / "b.jsonl")
    draft.write_text('{"model": "another", "seed": 7}\n')
    with pytest.raises(UserError, match=r"begun with other settings \(.*seed: 7 there, 0 here"):
        written(files, out)
    draft.write_text("[7\n")
    with pytest.raises(UserError, match=r"a.jsonl.draft is damaged .* begins anew"):
        written(files, out)
    with pytest.raises(UserError, match=r"its name must end in \.jsonl"):
        written(files, tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "--chat: .*no chat template|has no chat template"),
        ("{{ messages | length }}", "the chat template leaves out the user's words"),
        ("{% for x in messages %}{{ x.content }} END{% endfor %}", "no special token ends the"),
    ],
)
def test_templates_that_give_no_chats(files, template, message):
    tokenizer = find_checkpoint(files / "teacher").tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        ChatWriter(tokenizer, Sampling(1, chat=True))
