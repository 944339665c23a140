"""`supra eval suite` without lm-evaluation-harness: its own parts, and what it prints and keeps."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch

from supra import testing
from supra.checkpoint.card import read_card, update_card
from supra.checkpoint.opening import find_checkpoint
from supra.cli import main
from supra.conversion.convert import convert
from supra.data.packing import plain_tokens
from supra.errors import UserError
from supra.evaluate import blocks_from_text, perplexity
from supra.evaluate.suite import in_context, suite
from supra.evaluate.suite.data import check_folder, evenly
from supra.evaluate.suite.parts import Settings, prepare_parts
from supra.evaluate.suite.suite import evaluate_suite, measure_model
from supra.evaluate.text_perplexity import position_edges
from tests.evaluate.fake_model import Fake, copied
from tests.evaluate.suite_sets import write_sets

OURS = ("wikitext", "in_context")
SETTINGS = Settings(shots=(0, 2, 5), sequence_length=100)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    testing.tiny_checkpoint(folder / "teacher")
    convert(str(folder / "teacher"), folder / "rnn", mixer="supra")
    write_sets(folder / "data")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return testing.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def records(folders, name="icl"):
    lines = (folders / "data" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_shots_are_nested_and_queries_are_new(folders):
    drawn = in_context.draw_sets(records(folders), (0, 2, 5), None, seed=3)
    assert drawn == in_context.draw_sets(records(folders), (0, 2, 5), None, seed=3)
    assert drawn != in_context.draw_sets(records(folders), (0, 2, 5), None, seed=4)
    assert [x.task for x in drawn] == ["same"] * 5 + ["any"] * 5
    for one in drawn:
        assert (len(one.shots), len(one.queries)) == (5, 8)
        assert len({asked for asked, _ in one.shots + one.queries}) == 13
    few = in_context.draw_sets(records(folders), (0,), 3, seed=0)
    assert [len(one.queries) for one in few] == [1] * 6, "at most three queries of a task"


def test_an_input_with_two_outputs_is_asked_once():
    doubled = [{"task": "t", "input": str(n % 8), "output": str(n)} for n in range(16)]
    with pytest.raises(UserError, match=r"'t' has 8 inputs, and 2 shots with 8 queries need 10"):
        in_context.draw_sets(doubled, (2,), None, seed=0)


def test_a_prompt_shows_its_shots_and_asks(tokenizer):
    drawn = in_context.ShotSet("t", [("river", "sea"), ("day", "old")], [("hills", "south")])
    [row] = in_context.prompt_rows(tokenizer, drawn, 1)
    text = "Input: river\nOutput: sea\n\nInput: hills\nOutput: south\n"
    assert tokenizer.decode(row.tokens) == text
    assert tokenizer.decode(row.tokens[-row.scored :]) == " south\n", "up to the end of the line"
    [row] = in_context.prompt_rows(tokenizer, drawn, 0)
    assert tokenizer.decode(row.tokens) == "Input: hills\nOutput: south\n"


def test_an_answer_ends_as_those_of_the_shots_do(tmp_path, monkeypatch):
    """Though the tokenizer has another token for a blank line at the end of a text."""
    monkeypatch.setattr(testing.tiny, "_TEXT", ["river sea\n\n", "Input: Output: "])
    tokenizer = testing.tiny_tokenizer(tmp_path)
    assert plain_tokens(tokenizer, "sea\n\n")[-1] not in plain_tokens(tokenizer, "sea\n\nInput")
    drawn = in_context.ShotSet("t", [("river", "sea")], [("sea", "river")])
    [row] = in_context.prompt_rows(tokenizer, drawn, 1)
    shot = plain_tokens(
        tokenizer, "Input: river\nOutput: sea\n\nInput: sea\nOutput: river\n\nInput"
    )
    assert row.tokens == shot[: len(row.tokens)]


def test_a_model_that_copies_learns_what_the_shots_repeat(folders, tokenizer):
    sets = in_context.draw_sets(records(folders), (0, 1, 5), None, seed=0)
    found = in_context.measure_in_context(
        Fake(copied), tokenizer, sets=sets, shots=(0, 1, 5), batch=6
    )
    assert [x.name for x in found] == ["0 shots", "1 shots", "5 shots"]
    assert [x.by_stratum()["same"] for x in found] == [0, 1, 1], "the output is always the same"
    assert all(x.by_stratum()["any"] < 0.5 for x in found)


def test_in_context_hits_are_what_generate_says(folders, monkeypatch):
    """Whole answers, one after another, and without shared beginnings."""
    checkpoint = find_checkpoint(str(folders / "rnn"))
    model, tokenizer = checkpoint.model().eval(), checkpoint.tokenizer()
    monkeypatch.setattr(in_context, "ANSWER", "{}")
    monkeypatch.setattr(in_context, "END", "")
    [drawn, *_] = in_context.draw_sets(records(folders), (3,), 5, seed=0)
    shown = "".join(f"Input: {a}\nOutput:{b}" for a, b in drawn.shots)
    prompts = {asked: f"{shown}Input: {asked}\nOutput:" for asked, _ in drawn.queries}
    queries, hits = [], []
    for number, (asked, _) in enumerate(drawn.queries * 2):
        ids = torch.tensor([plain_tokens(tokenizer, prompts[asked])])
        said = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist()
        answer = tokenizer.decode([*said[:-1], (said[-1] + 1) % 250] if number % 2 else said)
        again = plain_tokens(tokenizer, prompts[asked] + answer)[ids.shape[1] :]
        queries.append((asked, answer))
        hits.append(again == said[: len(again)])
    sets = [in_context.ShotSet("t", drawn.shots, queries)]
    [found] = in_context.measure_in_context(model, tokenizer, sets=sets, shots=(3,), batch=2)
    assert found.value == sum(hits) / len(hits)


def test_wikitext_is_what_perplexity_says(folders):
    checkpoint = find_checkpoint(str(folders / "teacher"))
    parts = prepare_parts(["wikitext"], folders / "data", SETTINGS)
    found = {x.name: x for x in measure_model(checkpoint, parts)}
    texts = [record["text"] for record in records(folders, "wikitext")]
    blocks = blocks_from_text(checkpoint.tokenizer(), texts, 100)
    expected = perplexity(checkpoint.model(), blocks, by_position=position_edges(100))
    assert found["perplexity"].value == pytest.approx(expected.perplexity, rel=1e-6)
    assert len(expected.by_position) == 2
    for start, _, value in expected.by_position:
        assert found[f"perplexity after {start} tokens"].value == pytest.approx(value, rel=1e-6)
    assert found["perplexity after 0 tokens"].detail
    assert not found["perplexity after 64 tokens"].detail
    few = prepare_parts(["wikitext"], folders / "data", Settings(limit=3, sequence_length=100))
    [whole, *_] = measure_model(checkpoint, few)
    some = [blocks[at] for at in evenly(len(blocks), 3)]
    assert whole.value == pytest.approx(perplexity(checkpoint.model(), some).perplexity, rel=1e-6)


def test_items_of_a_limit_are_spread():
    assert evenly(10, None) == list(range(10)) == evenly(10, 99)
    assert evenly(10, 4) == [0, 2, 5, 7] and evenly(7, 1) == [0]


@pytest.mark.parametrize("name", ["teacher", "rnn"])
def test_batched_is_single(folders, name):
    parts = prepare_parts(OURS, folders / "data", Settings(5, (0, 3), 100))
    single, batched = (
        measure_model(find_checkpoint(str(folders / name)), parts, batch=batch) for batch in (1, 7)
    )
    for a, b in zip(single, batched, strict=True):
        assert a.title == b.title and a.values == pytest.approx(b.values, rel=1e-5)


def run(folders, *options, model="rnn"):
    names = ["--model", str(folders / model), "--data", str(folders / "data")]
    small = ["--shots", "0,2,5", "--sequence-length", "100", "--limit", "6"]
    small += ["--tasks", "in_context,wikitext"]
    main(["eval", "suite", *names, *small, *options])


def test_the_command_prints_all_results(folders, tmp_path, capsys):
    teacher = ["--teacher", str(folders / "teacher")]
    run(folders, *teacher, "--picture", str(tmp_path / "suite.png"))
    printed = capsys.readouterr().out
    assert "in_context 2 shots" in printed and "wikitext perplexity after 64 tokens" in printed
    assert "in-context tasks: teacher → model" in printed
    words = [line.split(" (")[0] for line in printed.splitlines()[-3:]]
    assert "kept" in words or "weakened" in words or "lost" in words, printed
    assert (tmp_path / "suite.png").read_bytes().startswith(b"\x89PNG")
    run(folders, *teacher, "--json")
    found = json.loads(capsys.readouterr().out)
    pair = found["measures"]["wikitext perplexity"]
    assert pair["kept"] == pytest.approx(pair["teacher"]["value"] / pair["model"]["value"])
    assert set(found["measures"]["in_context 5 shots"]["model"]["by_task"]) == {"same", "any"}
    assert sum(map(len, found["words"].values())) == 5 and found["shots"] == [0, 2, 5]


def test_one_model_alone(folders, tmp_path, capsys):
    run(folders, "--picture", str(tmp_path / "suite.png"), model="teacher")
    assert (tmp_path / "suite.png").read_bytes().startswith(b"\x89PNG")
    assert "kept" not in (printed := capsys.readouterr().out) and "6 items" in printed
    run(folders, "--json", model="teacher")
    found = json.loads(capsys.readouterr().out)
    assert found["teacher"] is None and "words" not in found


def test_a_model_keeps_all_of_itself(folders):
    checkpoint = find_checkpoint(str(folders / "rnn"))
    result = evaluate_suite(
        checkpoint, folders / "data", teacher=checkpoint, tasks=["wikitext"], settings=SETTINGS
    )
    assert result.words["kept"] == ["wikitext perplexity", "wikitext perplexity after 64 tokens"]
    assert [pair.kept for pair in result.comparisons] == [1] * 3


def test_finished_parts_are_kept(folders, tmp_path, capsys, monkeypatch):
    """Another command goes on where the first one stopped, and prints the same."""
    options = ["--teacher", str(folders / "teacher"), "--json"]
    run(folders, *options)
    expected = capsys.readouterr().out
    loaded, load_model = [], suite.load_model

    def interrupted(*arguments):
        loaded.append(arguments)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return load_model(*arguments)

    monkeypatch.setattr(suite, "load_model", interrupted)
    with pytest.raises(SystemExit):
        run(folders, *options, "--out", str(tmp_path / "kept"))
    assert len(list((tmp_path / "kept").iterdir())) == 2, "both parts of the teacher"
    capsys.readouterr()
    run(folders, *options, "--out", str(tmp_path / "kept"))
    assert capsys.readouterr().out == expected and len(loaded) == 3
    run(folders, *options, "--out", str(tmp_path / "kept"))
    assert capsys.readouterr().out == expected and len(loaded) == 3
    run(folders, *options, "--out", str(tmp_path / "kept"), "--seed", "1", "--limit", "5")
    capsys.readouterr()
    assert len(loaded) == 5, "other settings are measured anew"


def test_the_card_carries_the_table(folders, tmp_path, capsys):
    shutil.copytree(folders / "rnn", tmp_path / "rnn")
    options = ["--teacher", str(folders / "teacher"), "--card"]
    update_card(tmp_path / "rnn", tokens=7, results={})
    for limit in ("5", "6"):
        run(folders, *options, "--limit", limit, model=tmp_path / "rnn")
    text = read_card(tmp_path / "rnn" / "README.md").text
    assert text.count("## Beside its teacher") == 1 and "Trained on 7 tokens" in text
    assert "| wikitext perplexity |" in text and "at most 6 items" in text
    assert str(tmp_path) not in text, "a card may be published"
    update_card(tmp_path / "rnn", tokens=9, results={})
    text = read_card(tmp_path / "rnn" / "README.md").text
    assert "Beside its teacher" not in text, "it was measured before the training"
    with pytest.raises(SystemExit):
        run(folders, *options, model="teacher")
    assert "has no README.md that can be read" in capsys.readouterr().err


def test_a_teacher_with_another_vocabulary(folders, tmp_path):
    testing.tiny_checkpoint(tmp_path / "other")
    testing.tiny_tokenizer(tmp_path / "other", "<bos> $A")
    student, other = (find_checkpoint(str(x)) for x in (folders / "rnn", tmp_path / "other"))
    with pytest.raises(UserError, match=r"--teacher \(=.*other\) has another vocabulary"):
        evaluate_suite(student, folders / "data", teacher=other, tasks=OURS)


def test_mistakes_are_named_before_a_model_is_loaded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="there is no such folder"):
        check_folder(tmp_path / "none")
    for tasks in (["lambada"], ["arc_easy"]):
        if find_spec("lm_eval") is None:
            with pytest.raises(UserError, match=r"pip install .*wikitext and in_context run"):
                prepare_parts(tasks, tmp_path, SETTINGS)
    for task, message in (("wikitext", "has no file for wikitext"), ("in_context", "icl")):
        with pytest.raises(UserError, match=message):
            prepare_parts([task], tmp_path, SETTINGS)
