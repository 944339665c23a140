"""Invalid configs and plans give one line with the field, in every command that opens them."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from supra.checkpoint.config_rules import check_config, check_fields
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.convert import convert
from supra.conversion.inspection import inspect_model
from supra.errors import UserError
from supra.model.families import FAMILIES
from supra.testing import tiny_checkpoint

# fields of config.json -> what the error names
DAMAGES = [
    ({"head_dim": 0}, "head_dim .=0."),
    ({"head_dim": "8"}, "head_dim"),
    ({"hidden_size": -48}, "hidden_size .=-48."),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_key_value_heads": 4}, "multiple of .*num_key_value_heads .=4."),
    ({"hidden_act": "silo"}, "did you mean 'silu'"),
    ({"dtype": "float33"}, "dtype .='float33'. must be"),
    ({"dtype": "int8"}, "dtype"),
    ({"pad_token_id": 300}, "pad_token_id .=300. must be below vocab_size"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type 'spiral'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
    ({"layer_types": ["magic"] * 2}, "layer_types"),
]
PLANS = [
    ({"supra": 7}, "supra .=7. must be a mapping"),
    ({"supra": None}, "format_version None"),
    ({"supra": {"format_version": 1, "options": {}}}, "supra.layers"),
    ({"supra": {"format_version": 1, "layers": "supra", "options": {}}}, "supra.layers"),
    ({"supra": {"format_version": 1, "layers": ["supar"] * 2, "options": {}}}, "mixer 'supar'"),
    ({"supra": {"format_version": 1, "layers": ["supra"] * 2, "options": []}}, "supra.options"),
    (
        {"supra": {"format_version": 1, "layers": ["supra"] * 2, "options": {}}},
        "has no entry for 'supra'",
    ),
    ({"base_model_type": ["llama"]}, "base_model_type"),
    ({"base_model_type": "t5"}, "'t5'. is not a causal language model"),
    ({"state_policy": 7}, "state_policy .=7."),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("configs")
    tiny_checkpoint(where / "base")
    convert(str(where / "base"), where / "rnn", mixer="supra")
    return where


@pytest.fixture
def damaged(folders, tmp_path):
    """A copy of a model with other fields in its config.json."""

    def copy(name, changes):
        for file in (folders / name).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        fields = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(fields | changes))
        return tmp_path

    return copy


@pytest.mark.parametrize(("changes", "says"), DAMAGES, ids=str)
def test_a_source_of_no_sense(damaged, changes, says):
    folder = damaged("base", changes)
    with pytest.raises(UserError, match=says):
        inspect_model(find_checkpoint(str(folder)).config(), [8])
    with pytest.raises(UserError, match=says):
        find_checkpoint(str(folder)).model()
    with pytest.raises(UserError, match=says):
        convert(folder, folder / "out", mixer="supra")
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("changes", "says"), DAMAGES + PLANS, ids=str)
def test_a_converted_model_of_no_sense(damaged, changes, says):
    folder = damaged("rnn", changes)
    with pytest.raises(UserError, match=says):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UserError, match=says):
        find_checkpoint(str(folder)).model()


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "\xff", "[" * 100_000])
def test_a_file_that_is_no_object(damaged, text):
    folder = damaged("base", {})
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    for opened in (find_checkpoint(str(folder)).config, find_checkpoint(str(folder)).tokenizer):
        with pytest.raises(UserError, match=r"config\.json is"):
            opened()


def test_the_defaults_of_all_families_make_sense():
    for family in FAMILIES:
        config = CONFIG_MAPPING[family]()
        check_config(config)
        check_fields(json.loads(config.to_json_string()))


def test_a_policy_of_norms_has_a_size(damaged):
    folder = damaged("rnn", {"state_policy": {"norm": 1.5}})
    assert inspect_model(AutoConfig.from_pretrained(folder), [8]).state_bytes[8] > 0


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "is damaged"), ("[]", "not a JSON object"), ('{"eos_token_id": "end"}', "eos_token_id")],
)
def test_generation_config(damaged, text, says):
    folder = damaged("rnn", {})
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=f"generation_config.json.*{says}"):
        find_checkpoint(str(folder)).model()


def test_dense_models_of_families_with_experts_have_no_expert_per_token():
    given = {"model_type": "granitemoehybrid", "num_local_experts": 0, "num_experts_per_tok": 0}
    check_fields(given)
    with pytest.raises(UserError, match=r"num_experts_per_tok \(=1\) must be from 1 to"):
        check_fields(given | {"num_experts_per_tok": 1})
