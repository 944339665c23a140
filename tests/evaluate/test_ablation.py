"""What the parts of `supra eval ablate` say of models whose answers are known."""

import json

import datasets
import pytest
import torch

from supra import testing
from supra.checkpoint.opening import find_checkpoint
from supra.cli import main
from supra.conversion.convert import convert
from supra.data.blocks import blocks_from_text
from supra.errors import UserError
from supra.evaluate.ablate.ablation import PARTS
from supra.evaluate.ablate.floors import find_mixers, measure_floors
from supra.evaluate.ablate.layer_errors import check_teacher, measure_layer_errors
from supra.evaluate.ablate.lookback import NEAR, cut_rows, measure_look_back, weight_by_distance
from supra.evaluate.ablate.samples import generate_samples
from supra.evaluate.perplexity import perplexity

SENTENCES = [
    "The river rises in the far hills and runs down through the {} valley to the {}.",
    "Who sees the whole of a page at once has no need of the {} that we call {}.",
]
WORDS = ("sea", "bridge", "model", "stones", "token", "memory", "state", "page")
TEXT = " ".join(
    SENTENCES[n % 2].format(first, second)
    for n, (first, second) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
)
SHORT = ["The river rises.", "In 1843 the bridge.", "Who sees the page?"] * 20
EDGES = (0, 8, 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random teacher and its students, by mixer."""
    where = tmp_path_factory.mktemp("diagnostics")
    testing.tiny_checkpoint(where / "teacher")
    for name in ("window", "supra", "gated_delta", "softmax"):
        convert(str(where / "teacher"), where / name, mixer=name)
    convert(str(where / "teacher"), where / "hybrid", mixer="window", keep_attention=[1])
    (where / "text.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(3)))
    return where


@pytest.fixture(scope="module")
def load(folders):
    return lambda name: find_checkpoint(str(folders / name)).model().eval()


@pytest.fixture(scope="module")
def tokenizer(folders):
    return find_checkpoint(str(folders / "teacher")).tokenizer()


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def floors(model, blocks, **options):
    found = measure_floors(model, blocks, EDGES, **options).variants
    return {floor.name: floor for floor in found}


def test_nothing_leaves_the_window_of_short_documents(load, tokenizer):
    model, blocks = load("window"), blocks_from_text(tokenizer, SHORT, 48)
    assert max(block["position_ids"].max() for block in blocks) < 64
    found = floors(model, blocks)
    assert list(found) == ["intact", "linear only", "window only", "no mixing"]
    assert found["window only"].ratio == pytest.approx(1, rel=1e-6)
    assert found["linear only"].ratio != pytest.approx(1, rel=1e-3)
    for start, end, value, ratio in found["no mixing"].by_position:
        (own,) = [x[2] for x in found["intact"].by_position if x[:2] == (start, end)]
        assert ratio == pytest.approx(value / own)
    assert all(mixer.only is None for mixer in find_mixers(model))
    assert not any(mixer._forward_hooks for mixer in find_mixers(model))


def test_the_window_alone_is_less_where_documents_are_longer(load, tokenizer):
    blocks = blocks_from_text(tokenizer, [TEXT * 3], 256)
    model = load("window")
    found = measure_floors(model, blocks, (0, 64, 256)).variants
    window = next(floor for floor in found if floor.name == "window only")
    near, far = (ratio for *_, ratio in window.by_position)
    assert near == pytest.approx(1, rel=1e-6) and abs(far - 1) > 1e-3


@pytest.mark.parametrize("name", ["supra", "gated_delta", "window"])
def test_no_mixing_is_a_model_without_output_projections(load, tokenizer, name):
    model, blocks = load(name), blocks_from_text(tokenizer, SHORT, 48)
    found = floors(model, blocks)["no mixing"].perplexity
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    assert found == pytest.approx(perplexity(model, blocks).perplexity, rel=1e-6)


def test_floors_of_a_hybrid_and_beside_a_teacher(load, tokenizer):
    blocks = blocks_from_text(tokenizer, SHORT, 48)
    model, teacher = load("hybrid"), load("teacher")
    found = floors(model, blocks, teacher=teacher)
    assert list(found) == [
        "intact", "teacher", "linear only", "window only", "attention only", "no mixing",
    ]  # fmt: skip
    assert found["teacher"].perplexity == perplexity(teacher, blocks).perplexity
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    expected = perplexity(model, blocks).perplexity
    assert found["attention only"].perplexity == pytest.approx(expected, rel=1e-6)


def test_layer_errors(load, tokenizer):
    """The error is 0 with the teacher's own attention and 1 without output, for each layer."""
    documents = [*SHORT[:6], TEXT * 2]  # longer than the window, too
    blocks, teacher = blocks_from_text(tokenizer, documents, 128), load("teacher")
    assert (torch.stack([x["position_ids"] for x in blocks]) == 0).sum() > len(blocks)
    same = measure_layer_errors(load("softmax"), teacher, blocks, batch_size=3).layers
    assert [x.layer for x in same] == [0, 1] and max(x.error for x in same) < 1e-11
    model = load("hybrid")
    first, kept = measure_layer_errors(model, teacher, blocks).layers
    assert (first.mixer, kept.mixer) == ("window", "softmax")
    assert kept.error < 1e-11, "it reads what the teacher's layer reads"
    assert first.error > 1e-6
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    assert measure_layer_errors(model, teacher, blocks).layers[0].error == pytest.approx(1)


def test_layer_errors_are_of_all_tokens(load, tokenizer):
    """Errors do not depend on the batch size."""
    blocks, teacher, model = blocks_from_text(tokenizer, SHORT, 48), load("teacher"), load("supra")
    one, all_ = (
        [x.error for x in measure_layer_errors(model, teacher, blocks, batch_size=size).layers]
        for size in (1, len(blocks))
    )
    assert one == pytest.approx(all_, rel=1e-5)


@pytest.mark.parametrize("family", (*testing.MAIN_FAMILIES, "gpt2", "gemma2", "gpt_oss"))
def test_layer_errors_and_teacher_weights_in_other_families(tmp_path, family):
    teacher = testing.tiny_checkpoint(tmp_path / "teacher", family)
    convert(str(tmp_path / "teacher"), tmp_path / "rnn", mixer="softmax")
    model = find_checkpoint(str(tmp_path / "rnn")).model()
    tokenizer = find_checkpoint(str(tmp_path / "teacher")).tokenizer()
    # transformers' gpt_oss does not look at position_ids, so packed documents see each other
    documents = [TEXT] if family == "gpt_oss" else SHORT[:12]
    blocks = blocks_from_text(tokenizer, documents, 24)
    errors = measure_layer_errors(model, teacher, blocks).layers
    assert max(x.error for x in errors) < 1e-10
    before = teacher.config._attn_implementation
    found = measure_look_back(model, [blocks[0]["input_ids"].tolist()], teacher)
    assert teacher.config._attn_implementation == before
    for own, other in zip(found.model, found.teacher, strict=True):
        for name in ("distance", "current", "near", "far"):
            assert getattr(own, name) == pytest.approx(getattr(other, name), abs=1e-4)


def test_a_teacher_of_another_shape(load, tmp_path):
    other = testing.tiny_checkpoint(tmp_path, num_hidden_layers=3)
    with pytest.raises(UserError, match="num_hidden_layers 3 and the model has 2"):
        check_teacher(load("supra"), other)
    with pytest.raises(UserError, match="converted too"):
        check_teacher(load("supra"), load("window"))


def test_weights_by_distance():
    """The first column is left out, and weights count by their absolute value."""
    matrix = torch.zeros(1, 2, 80, 80)
    matrix[0, 0, :, 0] = 9.0
    matrix[0, 0, 70, 70], matrix[0, 0, 70, 60], matrix[0, 0, 79, 9] = -1.0, 2.0, 1.0
    matrix[0, 1] = torch.eye(80)
    sums = weight_by_distance(matrix)
    assert sums.shape == (2, 80)
    assert sums[0].nonzero().flatten().tolist() == [0, 10, 70]
    assert sums[0, [0, 10, 70]].tolist() == [1, 2, 1]
    assert sums[1].tolist() == [79.0] + [0.0] * 79


def test_look_back_of_known_mixers(load, monkeypatch):
    """All heads look at the token ten before, except one that looks 70 back half of the time."""
    model, tokens = load("supra"), 100

    def mixing_matrix(inputs):
        shifted = torch.eye(tokens).roll(10, 0).tril()
        matrix = shifted.expand(1, 6, -1, -1).clone()
        matrix[0, 3, 90, 20] = shifted[:, 1:].sum()
        return matrix

    for mixer in find_mixers(model):
        monkeypatch.setattr(mixer, "mixing_matrix", mixing_matrix)
    found = measure_look_back(model, [list(range(tokens))] * 2)
    assert found.tokens == tokens and found.teacher is None
    assert [(x.layer, x.mixer) for x in found.model] == [(0, "supra"), (1, "supra")]
    for layer in found.model:
        assert layer.distance == pytest.approx([10, 10, 10, 40, 10, 10])
        assert layer.far == pytest.approx([0, 0, 0, 0.5, 0, 0])
        assert layer.near == pytest.approx([1, 1, 1, 0.5, 1, 1]) and layer.current == [0] * 6
    assert "10.0 / 10.0 / 40.0" in "\n".join(found.lines()) and NEAR == 64


def test_rows_are_of_one_document_and_from_everywhere():
    documents = [list(range(5)), [9], list(range(10, 22)), list(range(30, 38))]
    assert cut_rows(documents, 4, 2) == [[0, 1, 2, 3], [18, 19, 20, 21]]
    assert cut_rows(documents[:2], 100, 2) == [[0, 1, 2, 3, 4]]
    with pytest.raises(UserError, match="no document of two or more tokens"):
        cut_rows([[1], []])


def test_samples_go_on_from_the_text(load, tokenizer):
    model, documents = load("window"), [tokenizer(TEXT)["input_ids"]]
    found = generate_samples(model, tokenizer, documents).samples
    assert len(found) == 3 and all(x.prompt in TEXT for x in found)
    ids = tokenizer(found[1].prompt, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=40, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    assert found[1].continuation == tokenizer.decode(expected, skip_special_tokens=True)


def run(folders, capsys, name, command, *arguments):
    main(["eval", command, "--model", str(folders / name), "--text", str(folders / "text.jsonl"),
          "--sequence-length", "64", "--tokens", "512", *map(str, arguments)])  # fmt: skip
    return capsys.readouterr().out


def test_the_command_as_json(folders, capsys, monkeypatch):
    monkeypatch.setattr("supra.evaluate.tasks.recall.QUERIES", 64)
    given = ("--teacher", folders / "teacher", "--recall-lengths", "128")
    found = json.loads(run(folders, capsys, "window", "ablate", *given, "--json"))
    assert set(PARTS) < set(found) and found["left_out"] == {}
    plain = json.loads(run(folders, capsys, "window", "text", "--json"))
    assert plain == {name: found[name] for name in plain}
    intact = found["floors"]["variants"][0]
    assert intact["perplexity"] == plain["perplexity"] and intact["ratio"] == 1
    assert {len(x["distance"]) for x in found["lookback"]["teacher"]} == {6}
    assert {x["length"] for x in found["recall"]["needles"]} == {128}
    assert found["labels"]["questions"] > 0 and len(found["samples"]["samples"]) == 3


def test_the_command_as_text(folders, capsys):
    printed = run(folders, capsys, "gated_delta", "ablate", "--parts", "floors,lookback,samples")
    for heading in ("perplexity", "floors:", "no mixing", "look-back", "samples:"):
        assert heading in printed
    assert "labels:" not in printed and "without" not in printed


def test_a_model_that_is_not_converted(folders, capsys):
    printed = run(folders, capsys, "teacher", "ablate", "--recall-lengths", "128")
    assert "without floors: the model has no mixers" in printed
    assert "without layers: " in printed and "without lookback: " in printed
    for heading in ("recall:", "labels:", "samples:"):
        assert heading in printed


RECALL = ["ablate", "--parts", "recall"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "teacher",
            ["ablate", "--parts", "floors"],
            "the model has no mixers: it is not converted",
        ),
        ("supra", ["ablate", "--parts", "layers"], "give --teacher"),
        ("supra", ["ablate", "--parts", "flors"], "unknown part 'flors': did you mean 'floors'?"),
        ("supra", [*RECALL, "--recall-lengths", "9"], "recall length (=9) must be"),
        ("supra", [*RECALL, "--recall-lengths", "0"], "--recall-lengths (=0) must be at least 1"),
        (
            "supra",
            ["ablate", "--parts", "labels", "--teacher", "teacher"],
            "is only used for floors, lay",
        ),
        ("supra", ["ablate", "--teacher", "nowhere/at/all"], "there is no such folder"),
        ("supra", ["text", "--teacher", "teacher"], "it belongs to supra eval ablate"),
        ("supra", ["text", "--recall-lengths", "256"], "it belongs to supra eval ablate"),
    ],
)
def test_mistakes_are_named(folders, capsys, monkeypatch, name, arguments, message):
    monkeypatch.chdir(folders)
    with pytest.raises(SystemExit) as exit:
        run(folders, capsys, name, *arguments)
    assert exit.value.code == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("supra: error: ")]
    assert len(errors) == 1 and message in errors[0]
