"""`supra diagnose`: what it reads, measures and reports, on models whose results are known."""

import json
import math

import datasets
import pytest
import torch
from tqdm import tqdm

import supra.long_context
from supra import testing
from supra.checkpoint.opening import find_checkpoint
from supra.cli import main
from supra.conversion.convert import convert
from supra.data.text import Documents, open_dataset
from supra.errors import UserError
from supra.long_context import StatePolicy, use_policy
from supra.long_context.diagnosis import diagnose, recorded_length
from supra.long_context.examination import Examination, Plan
from supra.long_context.findings import plain
from supra.long_context.pictures import joined
from supra.long_context.statistics import (
    DecaySums,
    RecurrentLayers,
    by_head,
    effective_remembrance,
    half_life,
    state_statistics,
)
from supra.long_context.stream import (
    Bucket,
    Buckets,
    Reader,
    TokenStream,
    cuts,
    fine_edges,
    mean_loss,
    pieces,
)
from supra.long_context.words import COLLAPSES, GREW, KEEPS, STABLE, departure, harm, head_verdict
from supra.losses.token_losses import next_token_nats
from supra.mixers import MIXERS
from supra.model.attention import attention_modules

NAMES = [name for name, mixer in MIXERS.items() if mixer.recurrent]
WORDS = ("river", "stones", "model", "token", "memory", "state", "page", "bridge", "sea")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Students of a random teacher, and a text of 120 documents."""
    where = tmp_path_factory.mktemp("diagnose")
    testing.tiny_checkpoint(where / "teacher")
    for name in NAMES:
        convert(str(where / "teacher"), where / name, mixer=name)
    convert(str(where / "teacher"), where / "hybrid", mixer="mamba2", keep_attention=[1])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(WORDS), (120, 20), generator=generator).tolist()
    lines = [json.dumps({"text": " ".join(WORDS[x] for x in row)}) for row in rows]
    (where / "text.jsonl").write_text("\n".join(lines) + "\n")
    (where / "short.jsonl").write_text("\n".join(lines[:9]) + "\n")
    return where


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(folders, name):
    return find_checkpoint(str(folders / name)).model().eval()


def stream_of(folders, text="text.jsonl"):
    tokenizer = find_checkpoint(str(folders / "teacher")).tokenizer()
    return TokenStream(tokenizer, Documents(open_dataset(str(folders / text)), "text")), tokenizer


def run(folders, name="mamba2", text="text.jsonl", **options):
    settings = {"stream_length": 256, "trained_length": 64, "chunk": 100} | options
    return diagnose(find_checkpoint(str(folders / name)), str(folders / text), **settings)


def random_tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, testing.VOCABULARY, (count,), generator=generator)


# the stream


def test_stream_is_the_documents_with_ends_between(folders):
    stream, tokenizer = stream_of(folders, "short.jsonl")
    texts = [json.loads(x)["text"] for x in (folders / "short.jsonl").read_text().splitlines()]
    expected = []
    for text in texts:
        expected += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    for tokens in (expected[:5], expected[5:]):
        assert stream.take(len(tokens)).tolist() == [tokens, tokens], "each is its own label"
    assert stream.restarts == 0
    assert stream.take(3)[0].tolist() == expected[:3] and stream.restarts == 1


def test_a_text_without_words_is_an_error(folders, tmp_path):
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n{"text": ""}\n')
    _, tokenizer = stream_of(folders)
    stream = TokenStream(tokenizer, Documents(open_dataset(str(tmp_path / "blank.jsonl")), "text"))
    with pytest.raises(UserError, match="the text is empty"):
        stream.take(1)


def test_long_documents_are_cut_before_spaces(folders):
    text = "the river runs to the sea " * 40 + "x" * 90 + " end"
    parts = list(pieces(text, 64))
    assert "".join(parts) == text and max(map(len, parts)) <= 64
    cut_words = [part for part in parts[1:] if not part.startswith(" ")]
    assert len(cut_words) == 1, "only what has no space is cut inside"
    _, tokenizer = stream_of(folders)
    whole = tokenizer(text[:1000])["input_ids"]
    assert [x for part in pieces(text[:1000], 64) for x in tokenizer(part)["input_ids"]] == whole


def test_pieces_end_at_marks():
    assert list(cuts(10, 4, [5, 0, 10, 12])) == [(0, 4), (4, 5), (5, 8), (8, 10)]
    assert list(cuts(3, 4)) == [(0, 3)]


@pytest.mark.parametrize("name", [*NAMES, "hybrid"])
def test_streaming_loss_is_that_of_one_pass(folders, name):
    model, tokens = load(folders, name).double(), random_tokens(157)
    reader, found = Reader(model), []
    for start, end in cuts(len(tokens), 40, [1, 64, 65]):
        found.append(reader.read(tokens[start:end]))
    positions, nats = (torch.cat(x) for x in zip(*found, strict=True))
    with torch.no_grad():
        logits = model(tokens[None], use_cache=False).logits[0]
    assert positions.tolist() == list(range(1, 157))
    # the nats are float32
    torch.testing.assert_close(nats, next_token_nats(logits[:-1], tokens[1:]), rtol=0, atol=2e-6)


def test_buckets_weigh_tokens_alike():
    buckets = Buckets([0, 2, 4, 100])
    buckets.add(torch.tensor([1, 2]), torch.tensor([1.0, 2.0]))
    buckets.add(torch.tensor([3, 4, 100]), torch.tensor([4.0, 5.0, 9.0]))
    first, second, third = buckets.found()
    assert (first.tokens, first.loss, second.tokens, second.loss) == (1, 1.0, 2, 3.0)
    assert (third.start, third.end, third.tokens, third.loss) == (4, 100, 1, 5.0)
    assert mean_loss(buckets.found()) == 3.0
    assert mean_loss(buckets.found(), start=2, end=4) == 3.0


def test_lines_are_even_on_their_axis():
    buckets = [Bucket(start, start + 16, 16, float(start)) for start in range(0, 4096, 16)]
    found = joined(buckets)
    assert sum(x.tokens for x in found) == 4096 and min(x.tokens for x in found[:-1]) >= 64
    assert found[0].loss == pytest.approx(24) and found[0].end == 64 == found[1].start
    ratios = [x.end / x.start for x in found if x.start > 1024]
    assert max(ratios) < 1.1 and len(found) < 50


@pytest.mark.parametrize("tokens", [1, 255, 257, 65536, 1_000_000])
def test_fine_buckets_are_few_and_cover_all(tokens):
    edges = fine_edges(tokens)
    assert len(edges) <= 257 + 1 and edges[0] == 0 and edges[-1] >= tokens


# states, decays and remembrance


def test_statistics_are_the_plain_formulas():
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(3, 24, 7, generator=generator, dtype=torch.float64) ** 3
    found = state_statistics(memory)
    for h, x in enumerate(memory):
        flat = x.flatten()
        squares = sorted((flat**2).tolist(), reverse=True)
        rows = sorted((x**2).sum(1).tolist(), reverse=True)
        variance = flat.var(unbiased=False).item()
        expected = {
            "norm": torch.linalg.matrix_norm(x).item(),
            "rms": math.sqrt(sum(squares) / 168),
            "mean": flat.mean().item(),
            "variance": variance,
            "kurtosis": ((flat - flat.mean()) ** 4).mean().item() / variance**2,
            "top_elements": sum(squares[:9]) / sum(squares),  # 5 % of 168 is 8.4
            "top_channels": sum(rows[:2]) / sum(rows),  # of 24 rows 1.2
        }
        got = {name: values[h].item() for name, values in found._asdict().items()}
        assert got == pytest.approx(expected, rel=1e-12)


def test_statistics_of_an_empty_state_are_zero():
    assert torch.stack(state_statistics(torch.zeros(2, 4, 4))).eq(0).all()


def test_a_gaussian_state_has_kurtosis_three():
    generator = torch.Generator().manual_seed(0)
    found = state_statistics(torch.randn(1, 500, 500, generator=generator))
    assert found.kurtosis.item() == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_by_attention_head(folders, name):
    model = load(folders, name)
    layers, reader = RecurrentLayers.of(model), Reader(model)
    reader.read(random_tokens(80))
    for layer, state in layers.states(reader).items():
        memory = reader.cache.layers[layer].state.memory
        assert state.dim() == 3 and len(state) == 6
        assert state.double().norm() == pytest.approx(memory.double().norm().item())
    h3 = torch.arange(1 * 4 * 3 * 2 * 1 * 5).view(1, 4, 3, 2, 1, 5)
    assert by_head(h3, 2)[1].flatten().tolist() == h3[0, 2:].flatten().tolist()


def test_decay_sums_of_a_known_decay(folders, tmp_path):
    convert(str(folders / "teacher"), tmp_path / "fixed", mixer="supra", options={"decay": "fixed"})
    model = find_checkpoint(str(tmp_path / "fixed")).model().eval()
    layers = RecurrentLayers.of(model)
    decays, reader, tokens = DecaySums(layers), Reader(model), random_tokens(70)
    for start, end in cuts(70, 32):
        with decays.watching(end - start):
            reader.read(tokens[start:end])
    slopes = torch.exp2(-8 * torch.arange(1, 7, dtype=torch.float64) / 6)
    for layer, mixer in layers.mixers.items():
        torch.testing.assert_close(decays.sums[layer][:, 0], -70 * slopes, rtol=1e-6, atol=0)
        assert mixer.watch is None
    assert half_life(decays.sums[0][0, 0].item(), 70) == pytest.approx(math.log(2) / slopes[0])
    assert half_life(0.0, 70) == math.inf


@pytest.mark.parametrize(("name", "channels"), [("mamba2", 1), ("rwkv", 8), ("gated_delta", 1)])
def test_decay_sums_are_of_the_tokens_read(folders, name, channels):
    """Reading in pieces gives the same: nothing is counted twice or left out."""
    model, found = load(folders, name), []
    for chunk in (13, 64):
        decays, reader = DecaySums(RecurrentLayers.of(model)), Reader(model)
        for start, end in cuts(64, chunk):
            with decays.watching(end - start):
                reader.read(random_tokens(64)[start:end])
        found.append(decays.sums[1])
    assert found[0].shape == (6, channels) and found[0].lt(0).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def set_log_decay(model, layer, head, half_life):
    """Set the log decay of a mamba2 head for every token: Δ with A = −1."""
    mixer = attention_modules(model)[layer].mixer
    step = math.log(2) / half_life
    with torch.no_grad():
        mixer.dt.weight[head] = 0
        mixer.dt.bias[head] = math.log(math.expm1(step))
        mixer.A_log[head] = 0


def test_remembrance_is_none_of_what_is_forgotten_at_once(folders):
    model = load(folders, "mamba2")
    tokens, starts = random_tokens(96), [12, 48, 84]
    settings = {"ends": 3, "chunk": 20}
    for layer in range(2):
        for head in range(6):
            set_log_decay(model, layer, head, 0.02)
    forgets = effective_remembrance(model, tokens, starts, **settings)
    assert max(forgets[:2]) < 1e-6
    for layer in range(2):
        for head in range(6):
            set_log_decay(model, layer, head, 1e4)
    keeps = effective_remembrance(model, tokens, starts, **settings)
    assert min(keeps) > 1e-3 and max(keeps) <= 1


def test_remembrance_is_the_formula(folders):
    model, tokens = load(folders, "supra"), random_tokens(64)
    (found,) = effective_remembrance(model, tokens, [24], ends=4, chunk=9)
    with torch.no_grad():
        whole, part = (model(x[None]).logits[0, -4:].softmax(-1) for x in (tokens, tokens[24:]))
    expected = (whole - part).abs().sum(-1).mean().item() / 2
    assert found == pytest.approx(expected, rel=1e-4)


# words


def test_departure():
    places = [1, 2, 3, 4, 5]
    assert departure([1, 1, 1, 1, 1], places, 2) is None
    assert departure([1, 1, 3, 3, 3], places, 2) == 3
    assert departure([1, 9, 1, 1, 1], places, 2) == 2, "with the mean of what follows"
    assert departure([1, 4, 1, 1, 1], places, 2) is None, "that was once"
    assert departure([1, 1, 3, 1.9, 3], places, 2) == 3
    assert departure([1, 1, 1, math.nan, math.inf], places, 2) == 4


def test_harm_is_a_share_and_at_least_some_nats():
    assert harm(3.2, 3.0) == pytest.approx(0.05) and harm(3.1, 3.0) < 0
    assert harm(0.04, 1e-6) < 0 < harm(0.06, 1e-6) and math.isnan(harm(math.nan, 3.0))


def test_head_verdicts():
    places = list(range(100, 900, 100))
    growing = [1.0 + 0.5 * n for n in range(8)]
    assert head_verdict(growing, places, 1.0, 0.99) == (COLLAPSES, 400)
    assert head_verdict(growing, places, 4.0, 0.99) == (KEEPS, None)
    assert head_verdict(growing, places, 4.0, 0.5) == (STABLE, None)
    assert head_verdict([1.5, *[3.0] * 7], places, 1.0, 0.5) == (GREW, 200)
    assert head_verdict([1.0] * 7 + [math.nan], places, 1.0, 0.5) == (COLLAPSES, 800)
    assert head_verdict([0.0] * 8, places, 0.0, 0.5) == (STABLE, None)


def examine(model, folders, stream_length=768, trained=32):
    plan = Plan.of(stream_length, trained, 64, None)
    found = Examination(model, RecurrentLayers.of(model), plan, tqdm(disable=True))
    found.read(stream_of(folders)[0])
    return found


def test_a_head_made_slow_is_named_and_a_fast_one_is_not(folders):
    model = load(folders, "mamba2")
    for layer in range(2):
        for head in range(6):
            set_log_decay(model, layer, head, 4)
    set_log_decay(model, 1, 2, 1e6)
    found = {(x.layer, x.head): x for x in examine(model, folders).heads()}
    slow, fast = found.pop((1, 2)), found[1, 3]
    assert slow.verdict == COLLAPSES and slow.growth > 4 and 32 < slow.since < 512
    assert slow.kept == pytest.approx(2 ** (-32e-6), rel=1e-6) and slow.half_life > 1e5
    assert {x.verdict for x in found.values()} == {STABLE}
    assert fast.kept == pytest.approx(2**-8, rel=1e-3) and fast.half_life == pytest.approx(4)
    assert fast.growth < 1.5 and fast.since is None


def test_the_first_part_read_anew_is_the_stream(folders):
    losses = examine(load(folders, "supra"), folders, stream_length=512).losses()
    assert len(losses.spans) == 16 and losses.spans[-1].end == 512
    first, *others = losses.spans
    assert (first.start, first.end) == (16, 32)
    assert first.loss == pytest.approx(first.anew, rel=1e-5)
    assert any(abs(x.loss / x.anew - 1) > 1e-4 for x in others)
    loss, anew = sum(x.loss for x in others), sum(x.anew for x in others)
    assert losses.ratio == pytest.approx(loss / anew)
    assert losses.excess == pytest.approx((loss - anew) / 15)


def test_losses_of_parts(folders):
    found = examine(load(folders, "supra"), folders, stream_length=300)
    losses = found.losses()
    total = sum(x.loss * x.tokens for x in losses.by_position)
    parts = 31 * losses.inside + (300 - 32) * losses.beyond
    assert total == pytest.approx(parts) and sum(x.tokens for x in losses.fine) == 299
    assert [x.start for x in losses.by_position] == [0, 64, 128, 256]
    assert examine(load(folders, "supra"), folders, stream_length=128).losses().beyond_four is None


@pytest.mark.parametrize("name", ["mamba2", "h3", "rwkv"])
def test_policies_are_in_force(folders, name):
    """Thresholds are per attention head, also in h3, which divides heads."""
    model = load(folders, name)
    with use_policy(model, StatePolicy(norm=[[0.01] * 6] * 2, norm_every=8)):
        found = examine(model, folders, stream_length=64, trained=32)
    looked_at = [i for i, place in enumerate(found.plan.probes) if place % 8 == 0]
    for head in found.heads():
        norms = [head.statistics["norm"][i] for i in looked_at]
        assert len(norms) > 3 and max(norms) < 0.01 * (1 + 1e-5)
    with use_policy(model, StatePolicy(window=64)):
        windowed = examine(model, folders, stream_length=64, trained=32).losses()
    free = examine(model, folders, stream_length=64, trained=32).losses()
    assert windowed.beyond == pytest.approx(free.beyond, rel=1e-5)


def test_half_precision(folders):
    model = load(folders, "mamba2")
    full = examine(model, folders, stream_length=64).losses().beyond
    half = examine(model.to(torch.bfloat16), folders, stream_length=64).losses().beyond
    assert half == pytest.approx(full, rel=0.02)


def test_the_package_has_it():
    assert supra.long_context.diagnose is diagnose
    with pytest.raises(AttributeError, match="has no attribute 'cure'"):
        _ = supra.long_context.cure


def test_results_do_not_depend_on_the_chunk(folders):
    settings = {"stream_length": 160, "trained_length": 32}
    one, other = (run(folders, "rwkv", chunk=x, **settings).as_dict() for x in (17, 512))
    assert one["losses"]["ratio"] == pytest.approx(other["losses"]["ratio"], rel=1e-5)
    for a, b in zip(one["heads"], other["heads"], strict=True):
        assert a["statistics"]["norm"] == pytest.approx(b["statistics"]["norm"], rel=1e-4)
        assert a["log_decay"] == pytest.approx(b["log_decay"], rel=1e-5)


# plans and the command


def test_plans():
    plan = Plan.of(65536, 1024, 1024, None)
    assert plan.probes[:3] == [128, 256, 384] and plan.probes[-1] == 65536
    assert len(plan.probes) == 64 + 7 and plan.spans[0] == 0 and plan.spans[-1] == 64512
    assert len(Plan.of(1_000_000, 1024, 1024, None).probes) <= 256 + 9
    small = Plan.of(64, 32, 8, None)
    assert len([x for x in small.probes if x > 32]) >= 4 and len(small.spans) == 2


def test_plan_counts_the_tokens_that_are_read(folders):
    for to in (100, 160):
        plan, read = Plan.of(to, 32, 20, None), []
        model = load(folders, "supra")
        bar = tqdm(disable=True)
        bar.update = read.append
        Examination(model, RecurrentLayers.of(model), plan, bar).read(stream_of(folders)[0])
        assert sum(read) == plan.steps


@pytest.mark.parametrize("name", [*NAMES, "hybrid"])
def test_every_mixer(folders, name):
    found = run(folders, name, stream_length=256)
    layers = 1 if name == "hybrid" else 2
    assert len(found.heads) == 6 * layers and found.kept_attention == ([1] if layers == 1 else [])
    assert [x.length for x in found.remembrance] == [64, 256]
    text = "\n".join(found.lines())
    assert ("Layers 1 keep softmax attention." in text) == (name == "hybrid")
    assert "effective remembrance" in text and "empty state" in text


def test_command_writes_json_and_pictures(folders, tmp_path, capsys):
    main(["diagnose", str(folders / "hybrid"), "--text", str(folders / "text.jsonl"),
          "--to", "256", "--trained-length", "64", "--out", str(tmp_path / "out"),
          "--json"])  # fmt: skip
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert set(printed) == {
        "model", "text", "tokens", "restarts", "trained_length", "policy", "kept_attention",
        "losses", "probes", "heads", "remembrance", "fix", "words",
    }  # fmt: skip
    assert printed["fix"] is None and printed["kept_attention"] == [1]
    head = printed["heads"][0]
    assert set(head["statistics"]) == {
        "norm", "rms", "mean", "variance", "kurtosis", "top_elements", "top_channels",
    }  # fmt: skip
    assert all(len(x) == len(printed["probes"]) for x in head["statistics"].values())
    for name in ("loss.png", "states.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / name).stat().st_size > 10_000


def test_a_text_that_is_too_short_is_said(folders):
    found = run(folders, text="short.jsonl", stream_length=1024, trained_length=256, chunk=256)
    assert found.restarts >= 1
    assert "The text ended before 1,024 tokens" in found.words()[0]


def test_a_run_says_its_length(folders, tmp_path):
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}")
    config = tmp_path / "run" / "config.yaml"
    config.write_text("data: {sequence_length: 48}\nextend: null\n")
    assert recorded_length(find_checkpoint(str(final))) == 48
    config.write_text("data: {sequence_length: 48}\nextend: {state_passing: 12}\n")
    assert recorded_length(find_checkpoint(str(final))) == 576
    config.write_text(
        "data: {sequence_length: 48}\nalign: {sequence_length: 24}\ntune: {sequence_length: 64}\n"
    )
    assert recorded_length(find_checkpoint(str(final))) == 64
    config.write_text("data: {sequence_length: 48}\ntune: {sequence_length: 16}\n")
    assert recorded_length(find_checkpoint(str(final))) == 16
    with pytest.raises(UserError, match="--trained-length is missing"):
        run(folders, trained_length=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stream_length": 127},
            r"--to \(=127\) must be at least twice the trained length \(=64\)",
        ),
        ({"trained_length": 7}, r"--trained-length \(=7\) must be at least 8"),
        ({"chunk": 0}, r"--chunk \(=0\) must be at least 1"),
        ({"every": 49}, r"--every \(=49\) must be from 1 to 48"),
        ({"fix_length": 99}, r"--fix-to \(=99\) is only for --fix auto"),
        ({"fix_text": "x"}, r"--fix-text \(=x\) is only for --fix auto"),
        ({"fix": "best"}, "unknown fix 'best'"),
        ({"fix": "auto", "fix_length": 127}, r"--fix-to \(=127\) must be at least twice"),
        ({"text": "none.jsonl"}, "no such file"),
        ({"text_field": "body"}, "text field 'body' is not in the data"),
        ({"name": "teacher"}, "has no mixers: run `supra convert`"),
    ],
)
def test_mistakes_are_named(folders, options, message):
    with pytest.raises(UserError, match=message):
        run(folders, **options)


def test_a_model_without_states_is_refused(folders, tmp_path):
    convert(str(folders / "teacher"), tmp_path / "softmax", mixer="softmax")
    with pytest.raises(UserError, match="all layers of the model keep softmax attention: convert"):
        diagnose(
            find_checkpoint(str(tmp_path / "softmax")),
            str(folders / "text.jsonl"),
            stream_length=256,
            trained_length=64,
        )


def test_learned_positions_bound_the_text(folders, tmp_path):
    testing.tiny_checkpoint(tmp_path / "teacher", "gpt2")
    convert(str(tmp_path / "teacher"), tmp_path / "rnn", mixer="mamba2")
    with pytest.raises(UserError, match=r"--to \(=4096\): the model has learned \d+ positions"):
        diagnose(
            find_checkpoint(str(tmp_path / "rnn")),
            str(folders / "text.jsonl"),
            stream_length=4096,
            trained_length=64,
        )


def test_pictures_need_matplotlib(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("supra.evaluate.tasks.heat_map.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        run(folders, out=tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    monkeypatch.undo()
    with pytest.raises(UserError, match="is not empty"):
        run(folders, out=tmp_path / "out")


def test_json_has_no_infinities():
    assert plain({"a": [math.inf, math.nan, 1 / 3], "b": (1, "x")}) == {
        "a": [None, None, 0.3333333],
        "b": [1, "x"],
    }
