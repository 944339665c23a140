"""Passkeys: the text and length of a prompt, reading in pieces, and what counts as an answer."""

import json
from random import Random
from types import SimpleNamespace

import pytest
import torch

from supra import testing
from supra.checkpoint.opening import find_checkpoint
from supra.cli import main
from supra.conversion.convert import convert
from supra.data import passkey as words
from supra.data.packing import IGNORE
from supra.data.passkey import FILLER, PREFIX, passkey, passkey_document
from supra.errors import UserError
from supra.evaluate.tasks import heat_map
from supra.evaluate.tasks import passkey as module
from supra.evaluate.tasks.passkey import (
    Answer,
    PasskeyResult,
    evaluate_passkey,
    greedy_answers,
    read_in_pieces,
)
from supra.evaluate.tasks.prompts import plain_tokens
from tests.native_models import native_checkpoint, native_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A softmax model, and recurrent ones converted from it."""
    folder = tmp_path_factory.mktemp("passkey")
    testing.tiny_checkpoint(folder / "softmax")
    for mixer in ("mamba2", "gated_delta", "window"):
        convert(str(folder / "softmax"), folder / mixer, mixer=mixer)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return find_checkpoint(str(folder / "softmax")).tokenizer()


def prompt(tokenizer, length=600, depth=0.5, seed=0, keys=1):
    found = passkey(tokenizer, length, depth, Random(seed), keys)
    return found, tokenizer.decode(found.prompt)


@pytest.mark.parametrize("length", [475, 476, 511, 512, 1000, 1001])
@pytest.mark.parametrize("depth", [0.0, 0.05, 0.5, 0.95])
def test_lengths_are_exact(tokenizer, length, depth):
    found, text = prompt(tokenizer, length, depth)
    assert len(found.prompt) == length
    assert text.startswith(PREFIX) and text.endswith("\nWhat is the pass key? The passkey is")
    assert text.count(f"The passkey is {found.key}. Remember it. {found.key} is the passkey.") == 1
    assert tokenizer.decode(found.answer) == f" {found.key}" and len(found.key) == 5


def test_only_the_first_filler_is_cut(tokenizer):
    for length in range(600, 640):
        found, text = prompt(tokenizer, length)
        body = text.removeprefix(PREFIX).split("\nWhat is the pass key?")[0]
        first, *others = body.splitlines(keepends=True)
        assert FILLER.endswith(first)
        assert [x for x in others if x != FILLER] == [
            f"The passkey is {found.key}. Remember it. {found.key} is the passkey.\n"
        ]


@pytest.mark.parametrize("depth", [0.0, 0.125, 0.5, 0.875, 0.999])
def test_the_key_is_at_its_depth(tokenizer, depth):
    _, text = prompt(tokenizer, 3000, depth)
    blocks = text.removeprefix(PREFIX).split("\nWhat is")[0].splitlines()
    assert len(blocks) > 20
    (place,) = [n for n, block in enumerate(blocks) if "passkey" in block]
    assert place == int(depth * (len(blocks) - 1))


def test_several_keys_have_numbers(tokenizer):
    asked, places = set(), set()
    for seed in range(12):
        found, text = prompt(tokenizer, 900, 0.5, seed, keys=3)
        assert len(found.prompt) == 900
        blocks = text.removeprefix(PREFIX).split("\nWhat is")[0].splitlines()
        stated = {n: block for n, block in enumerate(blocks) if "Remember it" in block}
        number = text.rpartition("The passkey ")[2].removesuffix(" is")
        assert text.endswith(f"\nWhat is the pass key {number}? The passkey {number} is")
        key = found.key
        statement = f"The passkey {number} is {key}. Remember it. {key} is the passkey {number}."
        assert stated[int(0.5 * (len(blocks) - 1))] == statement
        assert {x.split(" is ")[0] for x in stated.values()} == {
            f"The passkey #{n}" for n in (1, 2, 3)
        }
        assert len({x.split(" is ")[1][:5] for x in stated.values()}) == 3
        asked.add(number)
        places.add(tuple(stated))
    assert asked == {"#1", "#2", "#3"} and len(places) > 3


def test_seeds(tokenizer):
    assert prompt(tokenizer, seed=3) == prompt(tokenizer, seed=3)
    assert prompt(tokenizer, seed=3)[0].key != prompt(tokenizer, seed=4)[0].key


def test_keys_keep_their_zeros(tokenizer):
    class Low(Random):
        def sample(self, population, k):
            return [7]

    found = passkey(tokenizer, 500, 0.5, Low(0))
    assert found.key == "00007" and "is 00007." in tokenizer.decode(found.prompt)


def test_special_tokens_come_first(tokenizer, monkeypatch):
    monkeypatch.setattr(words, "start_tokens", lambda _: [0, 0])
    found = passkey(tokenizer, 600, 0.5, Random(0))
    assert found.prompt[:2] == [0, 0] and len(found.prompt) == 600
    assert tokenizer.decode(found.prompt[2:]).startswith(PREFIX)


@pytest.mark.parametrize("keys", [1, 4])
def test_no_room(tokenizer, keys):
    with pytest.raises(UserError, match=r"--lengths \(=50\) must be at least (\d+): ") as error:
        passkey(tokenizer, 50, 0.5, Random(0), keys)
    minimum = int(str(error.value).split("at least ")[1].split(":")[0])
    found = passkey(tokenizer, minimum, 0.5, Random(0), keys)
    assert len(found.prompt) == minimum and FILLER not in tokenizer.decode(found.prompt)
    for length in range(minimum + 1, minimum + len(plain_tokens(tokenizer, FILLER)) + 2):
        assert len(passkey(tokenizer, length, 0.5, Random(0), keys).prompt) == length


@pytest.mark.parametrize("special", [[], [0, 0]])
@pytest.mark.parametrize(("length", "keys"), [(201, 1), (256, 1), (700, 3)])
def test_a_document_to_train_on_ends_in_its_answer(tokenizer, monkeypatch, length, keys, special):
    monkeypatch.setattr(words, "start_tokens", lambda _: special)
    found = passkey_document(tokenizer, length, Random(1), keys)
    assert len(special) + len(found.tokens) == length and found.start == special
    said = [token for token in found.labels if token != IGNORE]
    assert found.tokens[-len(said) :] == found.labels[-len(said) :] == said
    text = tokenizer.decode(found.tokens)
    assert text.startswith(PREFIX) and tokenizer.decode(said).endswith("<|endoftext|>")
    key = tokenizer.decode(said[:-1]).strip()
    assert len(key) == 5 and text.count(f"{key}. Remember it. {key}") == 1


def test_a_document_without_room(tokenizer):
    with pytest.raises(
        UserError, match=r"tune.sequence_length \(=60\) must be at least (\d+)"
    ) as e:
        passkey_document(tokenizer, 60, Random(0), setting="tune.sequence_length")
    minimum = int(str(e.value).split("at least ")[1].split(":")[0])
    assert len(passkey_document(tokenizer, minimum, Random(0)).tokens) == minimum


@pytest.mark.parametrize("name", ["softmax", "mamba2", "gated_delta", "window"])
@pytest.mark.parametrize("piece", [1, 37, 64])
def test_reading_in_pieces_is_reading_at_once(folder, name, piece):
    model = find_checkpoint(str(folder / name)).model().eval()
    ids = torch.randint(300, (2, 131 if piece > 1 else 19), generator=torch.Generator())
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[:, -1]
    logits, cache = read_in_pieces(model, ids, piece)
    torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-4)
    assert cache["past_key_values"].get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("name", ["softmax", "mamba2", "native mamba2", "native bamba"])
def test_answers_are_those_of_generate(folder, tokenizer, name, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 100)
    if name.startswith("native"):
        model = native_model(name.removeprefix("native "))
    else:
        model = find_checkpoint(str(folder / name)).model().eval()
    prompts = [passkey(tokenizer, 480, depth, Random(n)) for n, depth in enumerate((0.1, 0.9))]
    for found, one in zip(greedy_answers(model, prompts), prompts, strict=True):
        output = model.generate(
            torch.tensor([one.prompt]), max_new_tokens=len(one.answer), do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert found == output[0, 480:].tolist()


class Reader:
    """A model that remembers everything and gives the key that is asked for, or `wrong`."""

    def __init__(self, tokenizer, wrong=lambda depth: None):
        self.tokenizer, self.wrong, self.widths = tokenizer, wrong, []

    def eval(self):
        return self

    def modules(self):
        return ()

    def parameters(self):
        return iter(())

    def named_modules(self):
        return ()

    def __call__(self, input_ids, past_key_values=None, **_):
        self.widths.append(input_ids.shape)
        rows = [
            old + new for old, new in zip(past_key_values or [[]] * len(input_ids),
                                          input_ids.tolist(), strict=True)
        ]  # fmt: skip
        logits = torch.zeros(len(rows), 1, testing.VOCABULARY)
        for logit, row in zip(logits, rows, strict=True):
            logit[0, self.next(row)] = 1
        return SimpleNamespace(logits=logits, past_key_values=rows)

    def next(self, row):
        text = self.tokenizer.decode(row)
        context, asked, said = text.rpartition("? The passkey")
        if not asked:
            return 0
        number, _, said = said.partition(" is")
        key = context.split(f"The passkey{number} is ")[1][:5]
        depth = context.index(f"is {key}") / len(context)
        answer = plain_tokens(self.tokenizer, self.wrong(depth) or f" {key}")
        starts = [self.tokenizer.decode(answer[:n]) for n in range(len(answer))]
        return answer[starts.index(said)] if said in starts else 0


def evaluate(folder, monkeypatch, model, **options):
    monkeypatch.setattr(module, "load_model", lambda *_: model)
    return evaluate_passkey(find_checkpoint(str(folder / "softmax")), **options)


@pytest.mark.parametrize("keys", [1, 3])
def test_one_that_finds_all(folder, tokenizer, monkeypatch, keys):
    reader = Reader(tokenizer)
    monkeypatch.setattr(module, "PIECE", 256)
    monkeypatch.setattr(module, "BATCH_TOKENS", 2100)
    options = {"lengths": (1000, 700), "depths": 3, "samples": 2, "keys": keys}
    found = evaluate(folder, monkeypatch, reader, **options)
    assert found.accuracy == 1 and found.lengths == [700, 1000]
    assert [x.depth for x in found.answers[:6]] == [(n + 0.5) / 6 for n in range(6)]
    assert len({x.key for x in found.answers}) == 12
    assert max(width for _, width in reader.widths) == 256
    assert max(rows for rows, _ in reader.widths) == 3
    assert found.as_dict()["any_key"] == pytest.approx(1 / keys)
    assert ("any of the 3 keys" in "\n".join(found.lines())) == (keys == 3)


def test_accuracy_by_depth(folder, tokenizer, monkeypatch):
    reader = Reader(tokenizer, lambda depth: " 1x2" if depth < 0.5 else None)
    found = evaluate(folder, monkeypatch, reader, lengths=[1500], depths=4, samples=2)
    assert found.row(1500) == [0, 0, 1, 1] and found.accuracy == 0.5
    as_dict = found.as_dict()
    assert as_dict["by_length"][1500] == {"accuracy": 0.5, "by_depth": [0, 0, 1, 1]}
    assert as_dict["guess"] == pytest.approx(1e-5)
    assert [x["hit"] for x in as_dict["answers"]] == [False] * 4 + [True] * 4
    assert found.lines()[-1].split() == ["1,500", "0.50", "0.00", "0.00", "1.00", "1.00"]
    assert found.lines()[-2].split() == ["0.12", "0.38", "0.62", "0.88"]


@pytest.mark.parametrize(
    ("said", "hit"),
    [
        (" 00123", True),
        ("00123", True),
        ("\n 00123 is", True),
        (" 123", False),
        (" 0012", False),
        (": 00123", False),
        (" 900123", False),
        ("", False),
    ],
)
def test_a_hit_comes_first(said, hit):
    assert Answer(100, 0.5, "00123", said).hit is hit


def run(folder, name, *words):
    main(["eval", "passkey", "--model", str(folder / name), *map(str, words)])


SMALL = ("--lengths", "480,520", "--depths", 3, "--samples", 1)


@pytest.mark.parametrize("name", ["softmax", "mamba2"])
def test_command(folder, tmp_path, capsys, name):
    picture = tmp_path / "map.png"
    run(folder, name, *SMALL, "--json", "--picture", picture)
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["task"] == "passkey" and found["lengths"] == [480, 520] and found["keys"] == 1
    assert len(found["answers"]) == 6 and 0 <= found["accuracy"] <= 1
    assert "3.00k/3.00k" in printed.err, "a bar counts tokens"
    assert picture.read_bytes().startswith(b"\x89PNG")
    run(folder, name, *SMALL)
    first, guess, *_ = capsys.readouterr().out.splitlines()
    assert "on passkey: accuracy" in first and "0.00001" in guess


def test_the_command_on_a_native_mamba2(tmp_path, capsys):
    native_checkpoint(tmp_path / "mamba2", "mamba2")
    run(tmp_path, "mamba2", *SMALL, "--json")
    found = json.loads(capsys.readouterr().out)
    assert len(found["answers"]) == 6 and {x["length"] for x in found["answers"]} == {480, 520}


def test_a_picture_of_many_lengths(tmp_path):
    answers = [
        Answer(length, depth, "00000", " 00000" if length < 20 else "")
        for length in range(1, 41)
        for depth in (0.25, 0.75)
    ]
    result = PasskeyResult("a", list(range(1, 41)), 2, 1, 1, 0, answers)
    result.draw(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--depths", 0], "--depths (=0) must be at least 1"),
        (["--samples", 0], "--samples (=0) must be at least 1"),
        (["--keys", 0], "--keys (=0) must be at least 1"),
        (["--keys", 100_001], "--keys (=100001) must be at most 100000"),
        (["--lengths", "600,100"], "--lengths (=100) must be at least"),
        (["--lengths", "x"], "must be integers"),
        (["--pairs", 3], "--pairs: it belongs to supra eval task"),
        (["--vocabulary", 3], "--vocabulary: it belongs to supra eval task"),
        (["--picture", "no/such/folder/map.png"], "make the folder no/such/folder first, it is"),
        (["--picture", "map.pdf"], "must be a file that ends in .png"),
        (["--text", "a.txt"], "--text: it belongs to supra eval text and supra eval ablate"),
    ],
)
def test_mistakes(folder, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        run(folder, "softmax", *words)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("supra: error: ") and message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task", "--task", "induction", "--keys", "2"], "belongs to supra eval passkey"),
        (["task", "--task", "mqar", "--picture", "a.png"], "belongs to supra eval passkey"),
        (["passkeys"], "did you mean 'passkey'?"),
        (["text", "--text", "a.txt", "--depths", "2"], "belongs to supra eval passkey"),
    ],
)
def test_options_of_other_tasks(folder, capsys, words, message):
    with pytest.raises(SystemExit):
        main(["eval", *words, "--model", str(folder / "softmax")])
    assert message in capsys.readouterr().err


def test_without_matplotlib(folder, capsys, monkeypatch):
    monkeypatch.setattr(heat_map, "find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        run(folder, "softmax", *SMALL, "--picture", "map.png")
    assert "pip install matplotlib" in capsys.readouterr().err
    run(folder, "softmax", "--lengths", 480, "--depths", 1, "--samples", 1)
    assert "accuracy" in capsys.readouterr().out


def test_positions_that_are_learned(tmp_path, capsys):
    testing.tiny_checkpoint(tmp_path / "gpt2", "gpt2")
    with pytest.raises(SystemExit):
        run(tmp_path, "gpt2", "--lengths", 600, "--depths", 1)
    message = "--lengths (=600): the model has learned 512 positions, and the answer takes up to 8"
    assert message in capsys.readouterr().err
    run(tmp_path, "gpt2", "--lengths", 504, "--depths", 1, "--samples", 1)
