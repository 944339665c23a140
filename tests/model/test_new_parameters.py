"""What conversion adds is float32 and starts at the same values, whatever the teacher's dtype."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from supra import testing
from supra.checkpoint.weights import ModuleReader
from supra.conversion.convert import convert
from supra.conversion.plan import plan_conversion, plan_layers
from supra.conversion.tensors import converted_tensors, load_converted
from supra.mixers import MIXERS, NEW_PARAMETERS, PRESETS, resolve_mixer
from supra.uptrain import models

NAMES = [name for name in (*MIXERS, *PRESETS) if name != "softmax"]  # it adds nothing
TEACHERS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(scope="module")
def teachers():
    """The same teacher in several dtypes, with enough heads to tell their decays apart."""
    sizes = {"num_attention_heads": 12, "hidden_size": 96, "num_key_value_heads": 4}
    config = testing.tiny_config(num_hidden_layers=1, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    found = {}
    for dtype in TEACHERS:
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype)
        teacher.load_state_dict(model.state_dict())
        found[dtype] = teacher
    return found


def plan(teacher, name, dtype=None):
    mixer, options = resolve_mixer(name)
    layers = plan_layers(1, mixer, ())
    return plan_conversion(ModuleReader(teacher), teacher.config, layers, {mixer: options}, dtype)


def new(tensors):
    return {name: x for name, x in tensors if NEW_PARAMETERS in name}


@pytest.mark.parametrize("name", NAMES)
def test_starts_do_not_depend_on_the_teachers_dtype(teachers, name):
    expected = new(converted_tensors(plan(teachers[torch.float32], name), 3, None))
    assert expected
    cases = [(dtype, None) for dtype in TEACHERS]
    cases += [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
    for of_teacher, dtype in cases:
        made = plan(teachers[of_teacher], name, dtype)
        written = new(converted_tensors(made, 3, None))
        assert written.keys() == expected.keys()
        assert {fate.dtype for fate in made.fates if fate.name in written} == {"float32"}
        for key, tensor in written.items():
            assert tensor.dtype == torch.float32, key
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_models_in_memory_hold_the_same(teachers, name):
    """The model that layer choice measures, and one built from a config alone."""
    made = plan(teachers[torch.bfloat16], name)
    expected = new(converted_tensors(made, 0, None))
    loaded = load_converted(made, 0, progress=False)
    assert loaded.dtype == torch.bfloat16
    for key, tensor in new(loaded.state_dict().items()).items():
        assert tensor.dtype == torch.float32, key
        assert torch.equal(tensor, expected[key]), key
    torch.manual_seed(0)
    fresh = new(AutoModelForCausalLM.from_config(made.config).state_dict().items())
    assert {x.dtype for x in fresh.values()} == {torch.float32}


@pytest.fixture(scope="module")
def folders(teachers, tmp_path_factory):
    """The teacher in bfloat16, converted by every mixer."""
    home = tmp_path_factory.mktemp("folders")
    teachers[torch.bfloat16].save_pretrained(home / "teacher")
    testing.tiny_tokenizer(home / "teacher")
    for name in NAMES:
        convert(home / "teacher", home / name, mixer=name)
    return home


@pytest.mark.parametrize("name", NAMES)
def test_loading_rounds_nothing(folders, teachers, name):
    expected = new(converted_tensors(plan(teachers[torch.float32], name), 0, None))
    for dtype in (None, "auto", "bfloat16", torch.float16):
        given = {} if dtype is None else {"dtype": dtype}
        loaded = AutoModelForCausalLM.from_pretrained(folders / name, **given)
        assert loaded.dtype == (torch.float16 if dtype == torch.float16 else torch.bfloat16)
        for key, tensor in new(loaded.state_dict().items()).items():
            assert tensor.dtype == torch.float32, key
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", ["h3", "window"])
def test_exports_round_nothing(folders, name, tmp_path):
    config = SimpleNamespace(
        student=str(folders / name), gradient_checkpointing=False, lora=None, teacher=None
    )
    student = models.load_student(config)
    tokenizer = AutoTokenizer.from_pretrained(folders / name)
    models.export(config, student.state_dict(), tokenizer, tmp_path)
    before, after = (load_file(x / "model.safetensors") for x in (folders / name, tmp_path))
    assert {x.dtype for x in new(after.items()).values()} == {torch.float32}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
