"""`supra diagnose --fix auto`, on a model whose weights make it collapse."""

import json
import math
import shutil

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from supra import testing
from supra.checkpoint.opening import find_checkpoint
from supra.cli import main
from supra.conversion.convert import convert
from supra.errors import UserError
from supra.long_context.cures import Trial, choose, try_cures, write_policy
from supra.long_context.diagnosis import diagnose
from supra.mixers.state_policy import StatePolicy
from supra.model.attention import attention_modules

TRAINED = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`collapsing` predicts the token that it read, because its embeddings are tied. Its heads
    never forget, and their growing states drown that prediction. The text repeats one letter, so
    that the prediction is right."""
    where = tmp_path_factory.mktemp("fix")
    testing.tiny_checkpoint(where / "teacher", tie_word_embeddings=True)
    for name in ("mamba2", "supra", "gated_delta"):
        convert(str(where / "teacher"), where / name, mixer=name)
    model = find_checkpoint(str(where / "mamba2")).model()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
        for attention in attention_modules(model):
            mixer = attention.mixer
            mixer.dt.weight.zero_()
            mixer.dt.bias.fill_(math.log(math.expm1(0.2)))
            mixer.A_log.fill_(math.log(1e-6))
    shutil.copytree(where / "mamba2", where / "collapsing")
    model.save_pretrained(where / "collapsing")
    (where / "text.txt").write_text("z" * 3000)
    return where


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def collapsing(folders, tmp_path):
    """A copy, because the policy is written into it."""
    shutil.copytree(folders / "collapsing", tmp_path / "rnn")
    return tmp_path / "rnn"


def run(folder, text, **options):
    settings = {"stream_length": 160, "trained_length": TRAINED, "fix": "auto"} | options
    return diagnose(find_checkpoint(str(folder)), str(text), **settings)


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_the_best_cure_is_found_written_and_loaded(folders, collapsing, tmp_path, capsys):
    before = config(collapsing)
    main(["diagnose", str(collapsing), "--text", str(folders / "text.txt"), "--to", "384",
          "--trained-length", str(TRAINED), "--fix", "auto",
          "--out", str(tmp_path / "out")])  # fmt: skip
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert "The loss breaks down from" in printed and found["losses"]["ratio"] > 1.5
    verdicts = [x["verdict"] for x in found["heads"]]
    assert {*verdicts} <= {"collapses", "grew"} and "collapses" in verdicts
    fix = found["fix"]
    trials = {x["name"]: x for x in fix["trials"]}
    assert next(iter(trials)) == "none" and len(trials) == 11
    assert fix["tokens"] == 8 * TRAINED and "after the tokens read before" in fix["text"]
    best = trials[fix["best"]]
    assert best["beyond"] < 0.1 * trials["none"]["beyond"]
    assert best["inside"] <= 1.01 * trials["none"]["inside"]
    assert f"before, {best['beyond']:.4f} after" in printed
    assert f"wrote state_policy into {collapsing}/config.json" in printed
    assert config(collapsing) == before | {"state_policy": best["policy"]}
    assert not list(collapsing.glob(".*"))
    model = AutoModelForCausalLM.from_pretrained(collapsing)
    policy = StatePolicy.from_dict(model.config.state_policy)
    assert policy == StatePolicy(**best["policy"])
    assert all(x.mixer.policy == policy.of_layer(0) for x in attention_modules(model))


def test_a_second_run_keeps_what_is_there(folders, collapsing):
    first = run(collapsing, folders / "text.txt")
    written = config(collapsing)
    second = run(collapsing, folders / "text.txt")
    assert second.policy is not None and "The model has a state_policy" in second.words()[0]
    assert second.losses.falls_apart_from is None and first.losses.falls_apart_from == 48
    assert [x.name for x in second.fix.trials][:2] == ["none", "as configured"]
    assert second.fix.trial("none").beyond == pytest.approx(first.fix.trial("none").beyond)
    assert second.fix.best == "as configured" and second.fix.written is None
    assert config(collapsing) == written
    assert "config.json already has this policy." in second.lines()


def test_what_the_trials_measure_is_what_the_model_does(folders):
    """A model that is loaded with the policy, and reads the text at once, has the same loss."""
    tokens = torch.full((96,), 77)
    model = find_checkpoint(str(folders / "collapsing")).model().eval()
    trials, best = try_cures(model, tokens, TRAINED, [[0.5] * 6] * 2, chunk=20)
    assert model.config.state_policy is None and best is not None
    for trial in trials:
        policy = None if trial.policy is None else {**trial.policy}
        loaded = AutoModelForCausalLM.from_pretrained(
            folders / "collapsing", state_policy=policy
        ).eval()
        with torch.no_grad():
            logits = loaded(tokens[None]).logits[0, TRAINED - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, tokens[TRAINED:])
        assert trial.beyond == pytest.approx(loss.item(), rel=1e-3, abs=1e-4), trial.name


def test_norms_are_those_of_the_diagnosis(folders, collapsing):
    found = run(collapsing, folders / "text.txt")
    norms = found.fix.trial("norm as in training").policy["norm"]
    assert [len(x) for x in norms] == [6, 6]
    for head in found.heads:
        assert norms[head.layer][head.head] == head.largest_norm > 0


def test_refused_policies_are_said_and_left_out(folders):
    model = find_checkpoint(str(folders / "gated_delta")).model().eval()
    trials, _ = try_cures(model, torch.full((70,), 77), TRAINED, [[1.0] * 6] * 2)
    refused = {x.name: x.note for x in trials if x.beyond is None}
    assert len(refused) == 4 and {*refused} > {"window 16", "window 32", "window 64"}
    assert all(x.startswith("layer 0 (gated_delta): ") for x in refused.values())
    assert all(x.inside is not None for x in trials if x.name not in refused)


def test_insertion_that_cannot_act_is_said(folders):
    """With a GroupNorm behind it, the scale of what is written has no effect."""
    model = find_checkpoint(str(folders / "supra")).model().eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 300, (100,), generator=generator)
    trials, _ = try_cures(model, tokens, TRAINED, [[1.0] * 6] * 2)
    assert trials[-1].name.endswith("insert 0.75") and trials[-1].note.startswith(
        "no effect: same as"
    )


def test_nothing_is_written_where_nothing_helps(folders, collapsing, monkeypatch):
    monkeypatch.setattr("supra.long_context.cures.GAIN", 1.0)
    before = (collapsing / "config.json").read_bytes()
    fix = run(collapsing, folders / "text.txt").fix
    assert fix.best is None and fix.written is None
    assert (collapsing / "config.json").read_bytes() == before
    assert fix.lines()[-1] == "No cure helps: config.json stays as it is."


def test_what_cures_are_tried_on(folders, collapsing, tmp_path, monkeypatch):
    monkeypatch.setattr("supra.long_context.cures.GAIN", 1.0)
    text, other = folders / "text.txt", tmp_path / "other.txt"
    other.write_text("q" * 500)
    short = tmp_path / "short.txt"
    short.write_text("z" * 200)
    fix = run(collapsing, text, fix_text=str(other), fix_length=80).fix
    assert fix.text == str(other) and fix.tokens == 80
    assert run(collapsing, text, fix_text=str(other), fix_length=600).fix.text.endswith("than once")
    assert (
        run(collapsing, short).fix.text == f"{short}, from its beginning: too little text follows"
    )


def test_hub_models_are_not_written_into(folders):
    from dataclasses import replace

    checkpoint = replace(find_checkpoint(str(folders / "mamba2")), hub_id="someone/model")
    with pytest.raises(UserError, match="is not a local folder: save it into one first"):
        diagnose(
            checkpoint, str(folders / "text.txt"), stream_length=96, trained_length=32, fix="auto"
        )


def trial(name, inside, beyond):
    return Trial(name, {}, inside, beyond, [])


def test_the_rule():
    none = trial("none", 3.0, 4.0)
    costly, good, better = trial("a", 3.04, 3.0), trial("b", 3.02, 3.5), trial("c", 2.9, 3.2)
    refused = Trial("d", {}, note="no")
    assert choose(none, [none, costly, good, refused]) == "b"
    assert choose(none, [none, costly, good, better]) == "c"
    assert choose(none, [none, costly, trial("e", 3.0, 3.999)]) is None
    assert choose(none, [none]) is None
    assert choose(none, [none, trial("f", 3.0, math.nan)]) is None
    exploded = trial("none", 3.0, math.nan)
    assert choose(exploded, [exploded, good]) == "b"
    assert choose(exploded, [exploded]) is None


def test_a_policy_is_written_whole(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "supra", "name": "γ"}')
    write_policy(tmp_path, {"window": 1024})
    expected = {"model_type": "supra", "name": "γ", "state_policy": {"window": 1024}}
    assert config(tmp_path) == expected and len(list(tmp_path.iterdir())) == 1
    write_policy(tmp_path, {"decay_scale": 0.5})
    assert config(tmp_path)["state_policy"] == {"decay_scale": 0.5}
