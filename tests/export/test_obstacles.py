"""What cannot be exported is refused before anything is written, with the way out."""

import shutil

import pytest

from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.conversion.inspection import inspect_model
from supra.errors import UserError
from supra.export.export import export
from supra.testing import tiny_checkpoint
from tests.export.models import set_fields

QWEN, GRANITE = "qwen3_5", "granite"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder of teachers by name."""
    folder = tmp_path_factory.mktemp("teachers")
    for family in ("llama", "qwen2", "qwen3", "gpt_neox"):
        tiny_checkpoint(folder / family, family)
    tiny_checkpoint(folder / "window", "mistral", sliding_window=9)
    tiny_checkpoint(folder / "gelu", "llama", hidden_act="gelu")
    tiny_checkpoint(folder / "narrow", "llama", hidden_size=36)
    tiny_checkpoint(folder / "scaled", "granite", residual_multiplier=0.5)
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    rope["original_max_position_embeddings"] = 128
    tiny_checkpoint(folder / "longrope", "llama", rope_parameters=rope)
    return folder


FORM = {"mixer": "mamba2", "options": {"form": "granite"}}
# teacher, how it is converted, target, what the line says
REFUSED = {
    "another mixer": ("llama", {"mixer": "gated"}, QWEN, "its layers are supra: convert with"),
    "attention everywhere": ("qwen3", {"mixer": "softmax"}, QWEN, "all its layers keep softmax"),
    "another family": ("gpt_neox", {"mixer": "gated_deltanet"}, QWEN, "layers of gpt_neox"),
    "biases": ("qwen2", {"mixer": "gated_deltanet"}, QWEN, r"biases \(model.layers.0.self_attn"),
    "no gate in the MLP": ("gelu", {"mixer": "gated_deltanet"}, QWEN, "hidden_act is gelu"),
    "kept without norms": (
        "llama", {"mixer": "gated_deltanet", "keep_attention": [1]}, QWEN,
        "layer 1 keeps attention without a norm",
    ),
    "a window": (
        "window", {**FORM, "keep_attention": [1]}, GRANITE, "sliding window of 9 tokens",
    ),
    "positions by length": (
        "longrope", {**FORM, "keep_attention": [1]}, GRANITE, "rope_type longrope",
    ),
    "multipliers": (
        "scaled", {"mixer": "gated_deltanet"}, QWEN, "residual_multiplier is 0.5",
    ),
    "taps": (
        "llama", {**FORM, "options": {"form": "granite", "conv_size": 1}}, GRANITE, "conv_size=4",
    ),
    "mamba2 in its own form": ("llama", {"mixer": "mamba2"}, GRANITE, "form=granite"),
    "norms in recurrent layers": ("qwen3", FORM, GRANITE, "norms, which mamba2 keeps"),
    "norms in kept layers": (
        "qwen3", {**FORM, "keep_attention": [1]}, GRANITE, "layer 1 keeps attention with a norm",
    ),
    "kept heads of another size": (
        "narrow", {**FORM, "keep_attention": [1]}, GRANITE, "have 36 channels together",
    ),
    "recurrent heads of another size": ("narrow", FORM, GRANITE, "6 heads of 16 channels"),
    "rotary": (
        "llama", {"mixer": "gated_deltanet", "options": {"rotary": True}}, QWEN, "rotary=false",
    ),
    "beta over 1": (
        "llama", {"mixer": "gated_deltanet", "options": {"beta_range": 2.0}}, QWEN, "beta_range=1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_forms_and_teachers_that_do_not_export(teachers, tmp_path, name):
    teacher, settings, target, says = REFUSED[name]
    convert(teachers / teacher, tmp_path / "rnn", **settings)
    with pytest.raises(UserError, match=says):
        export(tmp_path / "rnn", tmp_path / "out", to=target)
    assert [x.name for x in tmp_path.iterdir()] == ["rnn"]
    lines = "\n".join(inspect_model(find_checkpoint(str(tmp_path / "rnn")).config(), [1]).lines())
    assert f"not to {target}" in lines


@pytest.fixture(scope="module")
def ready(teachers):
    convert(teachers / "llama", teachers / "ready", export_ready=QWEN)
    return teachers / "ready"


def test_a_model_that_is_not_converted(teachers, tmp_path):
    with pytest.raises(UserError, match="not converted: run supra convert --export-ready qwen3_5"):
        export(teachers / "llama", tmp_path / "out", to=QWEN)


def test_an_unknown_target(ready, tmp_path):
    with pytest.raises(UserError, match="did you mean 'qwen3_5'"):
        export(ready, tmp_path / "out", to="qwen35")


def test_a_policy_on_the_state(ready, tmp_path):
    shutil.copytree(ready, tmp_path / "rnn")
    set_fields(tmp_path / "rnn", state_policy={"norm": 4.0})
    with pytest.raises(UserError, match="remove state_policy"):
        export(tmp_path / "rnn", tmp_path / "out", to=QWEN, idle_attention=True)


def test_an_adapter_that_is_not_merged(ready, tmp_path):
    shutil.copytree(ready, tmp_path / "rnn")
    (tmp_path / "rnn" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge_and_unload"):
        export(tmp_path / "rnn", tmp_path / "out", to=QWEN, idle_attention=True)


def test_a_pure_model_needs_the_idle_layer_and_a_hybrid_does_not(ready, teachers, tmp_path):
    with pytest.raises(UserError, match="give --idle-attention"):
        export(ready, tmp_path / "out", to=QWEN)
    convert(teachers / "qwen3", tmp_path / "rnn", export_ready=QWEN, keep_attention=[0])
    with pytest.raises(UserError, match="without attention layers: leave it out"):
        export(tmp_path / "rnn", tmp_path / "out", to=QWEN, idle_attention=True)


def test_export_ready_refuses_at_once(teachers, tmp_path):
    for teacher, says, settings in (
        ("qwen2", "biases", {}),
        ("llama", "layer 0 keeps attention without", {"keep_attention": [0]}),
        ("llama", r"mixer \(='mamba2'\) is not what qwen3_5 has", {"mixer": "mamba2"}),
        ("llama", "rotary=false", {"options": {"rotary": True}}),
    ):
        with pytest.raises(UserError, match=says):
            convert(teachers / teacher, tmp_path / "rnn", export_ready=QWEN, **settings)
    assert list(tmp_path.iterdir()) == []


def test_export_ready_takes_options_of_its_mixer(teachers, tmp_path):
    report = convert(
        teachers / "llama", tmp_path / "rnn", export_ready=QWEN, options={"conv_size": 3}
    )
    assert report.options["gated_deltanet"]["conv_size"] == 3
    assert "--mixer gated_deltanet" in report.command


def test_inspection_says_where_a_model_can_go(ready):
    found = inspect_model(find_checkpoint(str(ready)).config(), [1])
    assert found.exports[QWEN] == []
    assert "export:     to qwen3_5 with --idle-attention" in found.lines()
    assert "mamba2" in found.exports[GRANITE][0]
