"""What a user types: the commands end to end, and every mistake in one line with exit code 2."""

import json

import pytest
import torch

from supra.cli import main
from supra.conversion.convert import convert
from supra.model.state_size import cache_bytes, state_bytes
from supra.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random teacher, its pure and its hybrid student, and a text."""
    where = tmp_path_factory.mktemp("cli")
    tiny_checkpoint(where / "base", num_hidden_layers=3)
    convert(str(where / "base"), where / "rnn", mixer="supra")
    convert(str(where / "base"), where / "hybrid", mixer="supra", keep_attention=[1])
    (where / "text.txt").write_text("the river runs to the sea and the bridge stands. " * 200)
    return where


def fails(capsys, *arguments):
    """The one line that the command prints before it exits with 2."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("supra: error: ")]
    assert len(errors) == 1 and "Traceback" not in "".join(lines)
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "inspect {rnn} --context 7,1000000000000000000",
            "--context (=1000000000000000000) must be at most 1000000000000000",
        ),
        ("inspect {rnn} --context 1{zeros}", "must be integers with commas"),
        (
            "eval ablate --model {rnn} --text t --parts recall --recall-lengths 1000000000",
            "must be at most",
        ),
        (
            "eval task --model {rnn} --task induction --lengths 1000000000000",
            "must be at most 4194304",
        ),
        ("eval task --model {rnn} --task mqar --pairs 1000000000000", "must be at most 65536"),
        ("bench kernels --lengths 1000000000000", "--lengths (=1000000000000) must be at most"),
        (
            "bench compile --head-sizes 1000000000000",
            "--head-sizes (=1000000000000) must be at most",
        ),
        ("bench parallel --widths 1000000000000", "--widths (=1000000000000) must be at most"),
        (
            "convert --model {base} --out no --mixer supra --mixer-option decay=2024-13-01",
            "month must be in 1..12",
        ),
        (
            "convert --model {base} --out no --mixer supra --mixer-option decay=2024-01-01",
            "unknown decay datetime",
        ),
        (
            "convert --model {base} --out no --mixer supra --mixer-option decay=[decay,{deep}]",
            "unknown decay ['dec",
        ),
        ("convert --model {base} --out no --mixer-option expansion=1{zeros}", "Exceeds the limit"),
        *(
            (
                f"convert --model {{base}} --out no --mixer {mixer} --mixer-option {name}={10**30}",
                f"{name} (={10**30}) must be a whole number from",
            )
            for mixer, name in [
                ("supra", "expansion"),
                ("gated", "expansion"),
                ("window", "expansion"),
                ("window", "size"),
                ("window", "sinks"),
                ("h3", "head_size"),
                ("h3", "d_state"),
                ("rwkv", "rank"),
                ("mamba2", "conv_size"),
                ("nonlinear_gated", "sweeps"),
            ]
        ),
        (
            "convert --model {base} --out no --mixer-option decay=none --mixer-option decay=fixed",
            "--mixer-option decay is given twice: keep one",
        ),
    ],
)
def test_values_that_are_too_much(folders, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    values = {"rnn": folders / "rnn", "base": folders / "base", "zeros": 5000 * "0"}
    line = fails(capsys, *arguments.format(**values, deep=99 * "[" + 99 * "]").split())
    assert message in line and len(line) < 700
    assert list(tmp_path.iterdir()) == []


def test_convert(folders, tmp_path, capsys):
    main(["convert", "--model", f"{folders / 'base'}", "--out", f"{tmp_path / 'rnn'}",
          "--mixer", "supra", "--mixer-option", "feature_map=identity",
          "--keep-attention", "0,-1"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "layer 0 softmax, layer 1 supra, layer 2 softmax" in printed
    assert "feature_map=identity" in printed
    for fate in ("copied", "transformed", "new", "dropped"):
        assert f"{fate}: " in printed
    assert (tmp_path / "rnn" / "config.json").is_file()


@pytest.mark.parametrize("share", ["0.34", "34%"])
def test_convert_keeps_a_share(folders, tmp_path, capsys, share):
    main(["convert", "--model", f"{folders / 'base'}", "--out", f"{tmp_path / 'rnn'}",
          "--mixer", "supra", "--keep-attention", share])  # fmt: skip
    assert "layer 0 supra, layer 1 softmax, layer 2 supra" in capsys.readouterr().out


def test_convert_keeps_what_costs_most(folders, tmp_path, capsys):
    main(["convert", "--model", f"{folders / 'base'}", "--out", f"{tmp_path / 'rnn'}",
          "--mixer", "supra", "--keep-attention", "auto:67%",
          "--text", f"{folders / 'text.txt'}"])  # fmt: skip
    printed = capsys.readouterr()
    report = json.loads((tmp_path / "rnn" / "conversion.json").read_text())
    assert report["layers"].count("softmax") == 2
    for layer, (cost, name) in enumerate(zip(report["layer_costs"], report["layers"], strict=True)):
        kept = "kept" if name == "softmax" else "supra"
        assert f"{layer:6d} {cost:14.6f}  {kept}\n" in printed.out
    assert "measure: 100%" in printed.err


def test_layers_that_cannot_be_kept(folders, tmp_path, capsys):
    def convert_fails(*extra):
        arguments = ["--model", folders / "base", "--out", tmp_path / "x", "--keep-attention"]
        return fails(capsys, "convert", *arguments, *extra)

    text = ["--text", folders / "text.txt"]
    for share in ("0.0", "1.0", "1.5", "-0.25", "100%", "nan%"):
        assert "must be between 0 and 1" in convert_fails(share)
    assert "between 0 and 1" in convert_fails("auto:25", *text)
    assert "(='3.5,7') must be a share of the layers" in convert_fails("3.5,7")
    assert "such as auto:0.25" in convert_fails("auto", *text)
    assert "integers with commas" in convert_fails("most", *text)
    assert "needs a text" in convert_fails("auto:0.25")
    assert "only used when keep_attention is auto" in convert_fails("0.25", *text)
    assert "only used when keep_attention is auto" in convert_fails("1", *text)
    assert "no such file" in convert_fails("auto:0.25", "--text", tmp_path / "none.txt")
    assert list(tmp_path.iterdir()) == []


def test_inspect(folders, capsys):
    main(["inspect", str(folders / "rnn"), "--context", "10,1000"])
    assert "layers 0-2 supra" in capsys.readouterr().out
    main(["inspect", str(folders / "rnn"), "--context", "10,1000", "--json"])
    student = json.loads(capsys.readouterr().out)
    # 3 layers x 6 heads x 16 features x 8 channels x 4 bytes, whatever the context
    assert student["state_bytes"] == {"10": 9216, "1000": 9216}
    main(["inspect", str(folders / "base"), "--context", "10,1000", "--json"])
    teacher = json.loads(capsys.readouterr().out)
    # 3 layers x keys and values x 2 heads x 8 channels x 4 bytes a token
    assert teacher["state_bytes"] == {"10": 3840, "1000": 384000}
    assert student["parameters"] - teacher["parameters"] == student["new_parameters"] > 0


@pytest.mark.parametrize("spelling", ["{}", "--model {}", "--model={}"])
def test_the_model_comes_first_or_as_an_option(folders, capsys, spelling):
    words = spelling.format(folders / "rnn").split()
    main(["inspect", *words, "--json"])
    assert json.loads(capsys.readouterr().out)["layers"]
    main(["generate", *words, "--prompt", "the", "--max-new-tokens", "2"])
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "generate --prompt the"])
def test_two_models_are_refused(folders, capsys, command):
    model = folders / "rnn"
    line = fails(capsys, *command.split()[:1], model, "--model", model, *command.split()[1:])
    assert f"unexpected argument '{model}'" in line


def test_inspect_refuses_what_does_not_convert(folders, tmp_path, capsys):
    from transformers import AutoConfig

    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    assert "'t5' does not convert" in fails(capsys, "inspect", tmp_path)
    line = fails(capsys, "inspect", folders / "rnn", "--context", "0")
    assert "--context (=0) must be at least 1" in line


def test_state_size_is_what_a_real_cache_holds(folders):
    from supra.checkpoint.opening import find_checkpoint

    for name in ("base", "rnn", "hybrid"):
        checkpoint = find_checkpoint(str(folders / name))
        model = checkpoint.model().eval()
        cache = model(torch.zeros((1, 33), dtype=torch.long), use_cache=True).past_key_values
        assert state_bytes(checkpoint.config(), 33) == cache_bytes(cache)


def test_eval(folders, capsys):
    arguments = ["eval", "text", "--text", str(folders / "text.txt"), "--sequence-length", "128"]
    main([*arguments, "--model", str(folders / "rnn")])
    assert "perplexity" in capsys.readouterr().out
    main([*arguments, "--model", str(folders / "rnn"), "--json", "--batch", "1"])
    one = json.loads(capsys.readouterr().out)
    main([*arguments, "--model", str(folders / "rnn"), "--json", "--batch", "5"])
    five = json.loads(capsys.readouterr().out)
    assert one["perplexity"] == pytest.approx(five["perplexity"], rel=1e-5)
    assert [(start, end) for start, end, _ in one["by_position"]] == [(0, 64), (64, 128)]
    main([*arguments, "--model", str(folders / "rnn"), "--json", "--tokens", "128"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 127


def test_an_old_spelling_of_eval_prints_the_same(folders, capsys):
    model = ["--model", str(folders / "rnn"), "--sequence-length", "64", "--tokens", "64", "--json"]
    main(["eval", "text", "--text", str(folders / "text.txt"), *model])
    printed = capsys.readouterr()
    assert "note" not in printed.err
    main(["eval", "--text", str(folders / "text.txt"), *model])
    old = capsys.readouterr()
    assert old.out == printed.out and old.err.startswith("supra: note: supra eval has commands now")


@pytest.mark.parametrize(
    "extra", [[], ["--beams", "2"], ["--temperature", "0.8", "--top-p", "0.9"]]
)
def test_generate(folders, capsys, extra):
    main(["generate", "--model", str(folders / "rnn"), "--prompt", "the river",
          "--max-new-tokens", "5", *extra])  # fmt: skip
    assert capsys.readouterr().out.strip()


def test_no_model_there(folders, tmp_path, capsys):
    out = tmp_path / "rnn"
    assert "no such folder" in fails(
        capsys, "convert", "--model", tmp_path / "nowhere", "--out", out
    )
    assert "no such file" in fails(capsys, "convert", "--model", tmp_path / "a.gguf", "--out", out)
    assert "no config.json" in fails(capsys, "convert", "--model", tmp_path, "--out", out)
    assert "no such folder" in fails(capsys, "convert", "--model", "~nouser/x", "--out", out)
    line = fails(capsys, "convert", "--model", "nobody/no-model", "--out", out)
    assert "not a local folder and cannot be fetched from the hub" in line
    assert not out.exists()


def test_unknown_mixer_option_dtype_and_layer(folders, tmp_path, capsys):
    def convert_fails(*extra):
        return fails(
            capsys, "convert", "--model", folders / "base", "--out", tmp_path / "x", *extra
        )

    assert "did you mean 'supra'" in convert_fails("--mixer", "supar")
    option = ("--mixer", "supra", "--mixer-option")
    assert "did you mean 'feature_map'" in convert_fails(*option, "feature_mp=identity")
    assert "must be NAME=VALUE" in convert_fails(*option, "identity")
    assert "is not valid YAML" in convert_fails(*option, "decay=[1")
    assert "must be true or false" in convert_fails(*option, "scale=maybe")
    assert "--shard-size (=-1.0) must be above 0" in convert_fails("--shard-size", "-1")
    assert "--seed (=-1) must be at least 0" in convert_fails("--seed", "-1")
    assert "did you mean 'bfloat16'" in convert_fails("--dtype", "bfloat")
    assert "has layers 0 to 2" in convert_fails("--keep-attention", "3")
    assert "integers with commas" in convert_fails("--keep-attention", "3;4")
    assert list(tmp_path.iterdir()) == []


def test_occupied_output_folder(folders, tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    line = fails(capsys, "convert", "--model", folders / "base", "--out", tmp_path)
    assert "is not empty" in line
    assert (tmp_path / "precious").read_text() == "mine"


def test_bad_texts(folders, tmp_path, capsys):
    def eval_fails(text, *extra):
        return fails(capsys, "eval", "text", "--model", folders / "rnn", "--text", text, *extra)

    assert "no such file" in eval_fails(tmp_path / "missing.txt")
    (tmp_path / "blank.txt").write_text(" \n \n")
    assert "(0 tokens)" in eval_fails(tmp_path / "blank.txt")
    assert "sequence_length (=99999)" in eval_fails(
        folders / "text.txt", "--sequence-length", "99999"
    )
    assert "must be at least 1" in eval_fails(folders / "text.txt", "--batch", "0")
    (tmp_path / "other.jsonl").write_text('{"body": "words"}\n')
    assert "its fields are body" in eval_fails(tmp_path / "other.jsonl")


def test_a_prompt_without_tokens_or_template(folders, capsys):
    model = ["generate", "--model", folders / "rnn"]
    assert "--prompt is empty" in fails(capsys, *model, "--prompt", "")
    assert "no chat template" in fails(capsys, *model, "--prompt", "hello", "--chat")


def test_a_full_disk_is_one_line(folders, tmp_path, capsys, monkeypatch):
    from supra.checkpoint.shard_writer import ShardWriter

    def full(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    line = fails(capsys, "convert", "--model", folders / "base", "--out", tmp_path / "rnn")
    assert "No space left on device" in line
    assert list(tmp_path.iterdir()) == []
