"""`supra eval suite` gives the numbers of lm-evaluation-harness, and those of a check by hand."""

import gzip
import importlib
import json
import math

import pytest
import torch
import yaml

from supra import testing
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.errors import UserError
from supra.evaluate.suite.measure import ACCURACY
from supra.evaluate.suite.parts import LOCAL, TASK_FILES, Settings, prepare_parts
from supra.evaluate.suite.suite import measure_model
from tests.evaluate.suite_sets import write_sets

pytest.importorskip("lm_eval", reason="needs lm-eval 0.4.13 or newer")
harness = importlib.import_module("supra.evaluate.suite.harness")  # which imports lm_eval


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("harness")
    testing.tiny_checkpoint(folder / "teacher")
    convert(str(folder / "teacher"), folder / "rnn", mixer="mamba2")
    write_sets(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


@pytest.fixture(scope="module")
def measured(folders):
    """A function (model, batch) -> the measures by title."""
    parts = prepare_parts(LOCAL, folders / "data", Settings())

    def run(name, batch=4):
        found = measure_model(find_checkpoint(str(folders / name)), parts, batch=batch)
        return {measure.title: measure for measure in found}

    return run


def directly(folders, name):
    """What the harness itself finds, with its own model, in the folder of the data."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders / "data")
        manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False)
        model = HFLM(pretrained=str(folders / name), device="cpu", dtype="float32", batch_size=3)
        options = {"tasks": list(LOCAL), "task_manager": manager, "bootstrap_iters": 10}
        return simple_evaluate(model=model, **options)["results"]


@pytest.mark.parametrize("name", ["teacher", "rnn"])
def test_the_harness_finds_the_same(folders, measured, name):
    found, expected = measured(name), directly(folders, name)
    assert sorted(found) == [
        "blimp acc", "lambada acc", "lambada perplexity", "piqa acc", "piqa acc_norm",
    ]  # fmt: skip
    for measure in found.values():
        numbers = expected[measure.part]
        value = numbers[f"{measure.name},none"]
        if measure.kind == ACCURACY:
            assert measure.value == value
            error = numbers[f"{measure.name}_stderr,none"]
            assert measure.standard_error == pytest.approx(error, abs=1e-9)
        else:
            assert measure.value == pytest.approx(value, rel=1e-5)
    assert found["piqa acc"].chance == 0.5 and found["lambada acc"].chance == 0


def likelihood(model, tokenizer, context, text):
    """Of `text` behind `context`, in nats, and whether greedy decoding gives it."""
    start = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
    ids = tokenizer(context + text)["input_ids"]
    ids = torch.tensor([start + ids[len(start) :] if context else start + ids])
    with torch.no_grad():
        log_p = model(ids, use_cache=False).logits[0, len(start) - 1 : -1].double().log_softmax(-1)
    labels = ids[0, len(start) :]
    greedy = bool((log_p.argmax(-1) == labels).all())
    return log_p.gather(1, labels[:, None]).sum().item(), greedy


def rows(folders, name):
    file = next((folders / "data").glob(f"{name}*"))
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt") as lines:
        return list(map(json.loads, lines))


def test_a_check_by_hand_finds_the_same(folders, measured):
    checkpoint = find_checkpoint(str(folders / "rnn"))
    model, tokenizer, found = checkpoint.model().eval(), checkpoint.tokenizer(), measured("rnn")

    def of(context, text):
        return likelihood(model, tokenizer, context, text)

    nats = [of(*_last_word(row["text"]))[0] for row in rows(folders, "lambada")]
    perplexity = math.exp(-sum(nats) / len(nats))
    assert found["lambada perplexity"].value == pytest.approx(perplexity, rel=1e-5)
    hits, by_length = [], []
    for row in rows(folders, "piqa"):
        prompt, choices = (
            f"Question: {row['goal']}\nAnswer:",
            [f" {row[x]}" for x in ("sol1", "sol2")],
        )
        scores = [of(prompt, choice)[0] for choice in choices]
        hits.append(scores.index(max(scores)) == row["label"])
        scores = [x / (len(choice) - 1) for x, choice in zip(scores, choices, strict=True)]
        by_length.append(scores.index(max(scores)) == row["label"])
    assert found["piqa acc"].values == hits and found["piqa acc_norm"].values == by_length
    pairs = [
        (of("", x["sentence_good"])[0], of("", x["sentence_bad"])[0])
        for x in rows(folders, "blimp")
    ]
    assert found["blimp acc"].values == [good > bad for good, bad in pairs]


def _last_word(text):
    passage, word = text.rsplit(" ", 1)
    return passage, f" {word}"


@pytest.mark.parametrize("name", ["teacher", "rnn"])
def test_batched_is_single(measured, name):
    single, batched = measured(name, 1), measured(name, 9)
    for title, measure in single.items():
        assert measure.values == pytest.approx(batched[title].values, rel=1e-5)


def test_a_limit_spreads_its_items(folders, measured):
    parts = prepare_parts(["blimp"], folders / "data", Settings(limit=5))
    [found] = measure_model(find_checkpoint(str(folders / "teacher")), parts)
    whole = measured("teacher")["blimp acc"].values
    assert found.values == [whole[at] for at in (0, 2, 5, 8, 11)]


def rolling(folders):
    return {
        "task": "rolling",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folders / "data" / "wikitext.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }


def test_a_perplexity_of_words_weighs_them(folders):
    """Windows of a long text; bits per byte are no perplexity, and are left out."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager, checkpoint = harness.task_manager(own=False), find_checkpoint(str(folders / "rnn"))
    model, tokenizer = checkpoint.model().eval(), checkpoint.tokenizer()
    tasks = harness.load_tasks(manager, rolling(folders))
    [found] = harness.measure_tasks("rolling", tasks, model, tokenizer, limit=None, batch=3)
    direct = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2)
    options = {"tasks": [rolling(folders)], "task_manager": manager, "bootstrap_iters": 0}
    expected = simple_evaluate(model=direct, **options)["results"]["rolling"]
    assert found.title == "rolling word_perplexity"
    assert found.value == pytest.approx(expected["word_perplexity,none"], rel=1e-5)


def test_tasks_of_a_group_are_pooled(folders, measured):
    manager, checkpoint = harness.task_manager(own=False), find_checkpoint(str(folders / "rnn"))
    loaded = {"tasks": {}}
    for name in ("piqa", "blimp"):
        config = yaml.safe_load((TASK_FILES / f"{name}.yaml").read_text())
        file = next((folders / "data").glob(f"{name}*"))
        config["dataset_kwargs"]["data_files"]["test"] = str(file)
        loaded["tasks"] |= harness.load_tasks(manager, config)["tasks"]
    model, tokenizer = checkpoint.model().eval(), checkpoint.tokenizer()
    found = harness.measure_tasks("both", loaded, model, tokenizer, limit=None, batch=8)
    pooled = {measure.title: measure.values for measure in found}
    parts = measured("rnn")
    assert pooled["both acc"] == parts["piqa acc"].values + parts["blimp acc"].values
    assert pooled["both acc_norm"] == parts["piqa acc_norm"].values


def test_mistakes(folders, tmp_path):
    write_sets(tmp_path / "data")
    (tmp_path / "data" / "blimp.jsonl").write_text('{"sentence_good": "a", "sentence_bad": 7}\n')
    with pytest.raises(UserError, match=r"blimp.jsonl, line 1: field 'sentence_bad' \(=7\)"):
        prepare_parts(["blimp"], tmp_path / "data", Settings())
    goal = {"goal": "a", "sol1": "b", "sol2": "c", "label": 2}
    (tmp_path / "data" / "piqa_small.jsonl.gz").unlink()
    (tmp_path / "data" / "piqa.jsonl").write_text(json.dumps(goal) + "\n")
    with pytest.raises(UserError, match=r"field 'label' \(=2\) must be one of 0, 1"):
        prepare_parts(["piqa"], tmp_path / "data", Settings())


@pytest.mark.long  # the index of the harness's own tasks takes a quarter of a minute
def test_an_unknown_task_of_the_harness(folders):
    with pytest.raises(UserError, match="no task 'arc_eazy': did you mean 'arc_easy'"):
        prepare_parts(["arc_eazy"], folders / "data", Settings())
