"""State files: a state loads unchanged or not at all, whatever happened to file or model."""

import json
import os
import pickle
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from supra.checkpoint.weights import ModuleReader
from supra.conversion.plan import plan_conversion
from supra.conversion.tensors import load_converted
from supra.errors import UserError
from supra.long_context import StatePolicy, use_policy
from supra.mixers import MIXERS, PRESETS
from supra.states import load_state, save_state
from supra.testing import tiny_config, untrained_model

PLAN = ["mamba2", "softmax", "window", "h3"]
TOKENS = torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def mixed_model(seed=0):
    """A model of four layers with states of every kind: sums, a cache with a window, counts."""
    config = tiny_config("mistral", num_hidden_layers=4, sliding_window=9)
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(config)
    plan = plan_conversion(ModuleReader(base), config, PLAN, {n: {} for n in PLAN}, None)
    return load_converted(plan, seed, progress=False).eval()


@pytest.fixture(scope="module")
def model():
    return mixed_model()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("state") / "state.safetensors"
    with torch.no_grad():
        save_state(model(TOKENS, use_cache=True).past_key_values, file)
    return file


def contents(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def layers_with(change):
    """Each layer's entry in the header after `change`."""

    def damage(header, tensors):
        layers = json.loads(header["layers"])
        header["layers"] = json.dumps(change(layers) or layers)

    return damage


def all_of_length(length):
    return layers_with(lambda all: [layer | {"length": length} for layer in all])


def tensor_with(name, change):
    def damage(header, tensors):
        tensors[name] = change(tensors[name]).contiguous()

    return damage


def filled(value, at=0):
    def change(x):
        x = x.clone()
        x.view(-1)[at] = value
        return x

    return change


WITHOUT_TENSOR = [
    "0.memory",
    "0.conv_state",
    "1.key",
    "1.valid",
    "2.length",
    "2.sink_key",
    "3.memory",
]
OTHER_DTYPE = [("0.memory", torch.float64), ("0.memory", torch.bfloat16), ("1.key", torch.float16),
               ("1.valid", torch.int64), ("2.length", torch.int32), ("2.length", torch.float32),
               ("3.memory", torch.int32)]  # fmt: skip
OTHER_SHAPE = {
    "a row less": ("0.memory", lambda x: x[:1]),
    "a row more": ("1.key", lambda x: torch.cat([x, x[:1]])),
    "no rows": ("2.length", lambda x: x[:0]),
    "a head less": ("0.memory", lambda x: x[:, 1:]),
    "a feature less": ("3.memory", lambda x: x[..., 1:]),
    "one dimension less": ("0.memory", lambda x: x.flatten(1, 2)),
    "one dimension more": ("0.conv_state", lambda x: x[..., None]),
    "a number": ("2.length", lambda x: x[0]),
    "transposed": ("2.memory", lambda x: x.mT),
    "a place less": ("1.key", lambda x: x[:, 1:]),
    "a place more": ("1.value", lambda x: torch.cat([x, x[:, :1]], dim=1)),
    "a tap less": ("0.conv_state", lambda x: x[:, 1:]),
}
DAMAGED = {
    **{f"no {n}": (lambda h, t, n=n: t.pop(n), f"{n} is missing") for n in WITHOUT_TENSOR},
    **{f"{n} {d}": (tensor_with(n, lambda x, d=d: x.to(d)), f"{n} is {d} and this model's is")
       for n, d in OTHER_DTYPE},
    **{case: (tensor_with(*change), "must be") for case, change in OTHER_SHAPE.items()},
    "no tensors": (lambda h, t: t.clear(), "is missing"),
    "a stray tensor": (lambda h, t: t.update(x=torch.ones(2)), "x is not one of this model's"),
    "a layer too many": (lambda h, t: t.update({"4.memory": torch.ones(2)}), "4.memory is not one"),
    "all of one place less": (
        lambda h, t: t.update({n: t[n][:, 1:].clone() for n in ("1.key", "1.value", "1.valid")}),
        "must be",
    ),
    "nan": (tensor_with("0.memory", filled(torch.nan)), "0.memory has numbers that are not finite"),
    "inf": (tensor_with("1.value", filled(-torch.inf, -1)), "1.value has numbers that are not"),
    "a negative count": (tensor_with("2.length", filled(-1)), "2.length must count from 0 to 20"),
    "too large a count": (tensor_with("2.length", filled(21)), "2.length must count from 0 to 20"),
    "no format": (lambda h, t: h.pop("format") and None, "is not a state file"),
    "another format": (lambda h, t: h.update(format="pt"), "is not a state file"),
    "no layers": (lambda h, t: h.pop("layers") and None, "its header has no JSON as layers"),
    "cut JSON": (lambda h, t: h.update(layers=h["layers"][:-3]), "no JSON as layers"),
    "deep JSON": (lambda h, t: h.update(layers="[" * 200_000), "no JSON as layers"),
    "a number for layers": (lambda h, t: h.update(layers="3"), "must list a length"),
    "an empty list": (lambda h, t: h.update(layers="[]"), "must list a length"),
    "a list of numbers": (lambda h, t: h.update(layers="[1, 2, 3, 4]"), "must list a length"),
    "no weights": (lambda h, t: h.update(weights=""), "no JSON as weights"),
    "a list of weights": (lambda h, t: h.update(weights="[]"), "a checksum for every parameter"),
    **{f"length {x}": (all_of_length(x), "must list a length >= 1")
       for x in (-20, 0, 2.5, True, None, "20", 10**30)},
    "another length": (layers_with(lambda all: all[1].update(length=19)), "read 19 to 20 tokens"),
    "too short a length": (all_of_length(3), "must be"),
    "no length": (layers_with(lambda all: all[0].pop("length") and None), "must list a length"),
    "no name": (layers_with(lambda all: all[0].pop("state") and None), "must list a length"),
    "a name less": (layers_with(lambda all: all[1:]), "other mixers"),
    "another name": (layers_with(lambda all: all[0].update(state="H3State")), "other mixers"),
    "names in another order": (layers_with(lambda all: all[::-1]), "other mixers"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(model, whole, tmp_path, case):
    damage, message = DAMAGED[case]
    header, tensors = contents(whole)
    damage(header, tensors)
    save_file(tensors, tmp_path / "state", header)
    with pytest.raises(UserError, match=message) as refused:
        load_state(tmp_path / "state", model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kept", [0, 4, 8, 200, -1])
def test_a_cut_file_is_named(model, whole, tmp_path, kept):
    (tmp_path / "state").write_bytes(whole.read_bytes()[:kept])
    with pytest.raises(UserError, match="cannot be read as a state"):
        load_state(tmp_path / "state", model)
    with pytest.raises(UserError, match="cannot be read as a state"):
        load_state(tmp_path, model)


@torch.no_grad()
@pytest.mark.parametrize("mixer", [*MIXERS, *PRESETS])
def test_every_mixers_state_is_whole(mixer, tmp_path):
    """After one token, after several with padding, and after one more."""
    model = untrained_model(tiny_config("llama"), mixer).eval()
    mask = torch.ones(2, 4, dtype=torch.long)
    mask[0, 1:3] = 0
    cache = model(TOKENS[:, :1], use_cache=True).past_key_values
    for start, end in ((1, 4), (4, 5)):
        save_state(cache, tmp_path / "state")
        loaded, given = load_state(tmp_path / "state", model), {"attention_mask": mask[:, :end]}
        found, expected = (
            model(TOKENS[:, start:end], past_key_values=x, **given).logits for x in (loaded, cache)
        )
        assert torch.equal(found, expected)
        mask = torch.cat([mask, mask[:, :1]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("policy", [StatePolicy(window=5), StatePolicy(norm=0.5, norm_every=4)])
@pytest.mark.parametrize("mixer", ["mamba2", "h3"])
def test_a_state_under_a_policy_is_whole(mixer, policy, tmp_path):
    model = untrained_model(tiny_config("llama"), mixer).eval()
    with use_policy(model, policy):
        save_state(model(TOKENS, use_cache=True).past_key_values, tmp_path / "state")
        load_state(tmp_path / "state", model)
        header, tensors = contents(tmp_path / "state")
        name = next(name for name in tensors if ".past_" in name)
        save_file({n: x for n, x in tensors.items() if n != name}, tmp_path / "state", header)
        with pytest.raises(UserError, match=f"{name} is missing"):
            load_state(tmp_path / "state", model)


@torch.no_grad()
def test_another_models_state_is_refused(model, whole):
    load_state(whole, pickle.loads(pickle.dumps(model)))
    with pytest.raises(UserError, match=r"with other weights, such as .*: read the prompt again"):
        load_state(whole, mixed_model(seed=1))
    load_state(whole, mixed_model(seed=1), other_weights=True)
    with pytest.raises(UserError, match="must be a converted model"):
        load_state(whole, AutoModelForCausalLM.from_config(tiny_config("llama")))


@torch.no_grad()
@pytest.mark.parametrize("name", ["layers.2.mlp.up_proj.weight", "layers.0.self_attn.mixer.D"])
def test_one_step_of_training_makes_another_model(model, whole, name):
    tuned = pickle.loads(pickle.dumps(model))
    tuned.model.get_parameter(name).add_(1e-4)
    with pytest.raises(UserError, match=f"other weights, such as {name}"):
        load_state(whole, tuned)


def test_adapters_make_another_model(model, whole):
    peft = pytest.importorskip("peft", reason="needs peft")
    adapted = peft.get_peft_model(pickle.loads(pickle.dumps(model)), peft.LoraConfig())
    with pytest.raises(UserError, match="other weights"):
        load_state(whole, adapted)


@torch.no_grad()
def test_the_dtype_of_the_weights_is_the_states(model, whole):
    with pytest.raises(UserError, match=r"is torch.float32 and .* is torch.bfloat16"):
        load_state(whole, pickle.loads(pickle.dumps(model)).bfloat16())


@torch.no_grad()
def test_a_file_without_checksums_of_weights_loads(model, whole, tmp_path):
    """As written by earlier versions, or when the model is gone or the cache was pickled."""
    header, tensors = contents(whole)
    del header["weights"]
    save_file(tensors, tmp_path / "state", header)
    expected = model(TOKENS[:, :3], past_key_values=load_state(whole, model)).logits
    found = model(TOKENS[:, :3], past_key_values=load_state(tmp_path / "state", model)).logits
    assert torch.equal(found, expected)
    copied = pickle.loads(pickle.dumps(load_state(whole, model)))
    save_state(copied, tmp_path / "copied")
    assert contents(tmp_path / "copied")[0].keys() == header.keys()


@torch.no_grad()
def test_a_file_with_the_field_names_of_earlier_versions_loads(model, whole, tmp_path):
    header, tensors = contents(whole)
    old = {"conv_state": "recent", "window_key": "recent_key", "window_value": "recent_value"}
    renamed = {}
    for name, x in tensors.items():
        layer, field = name.split(".")
        renamed[f"{layer}.{old.get(field, field)}"] = x
    assert len(renamed.keys() - tensors.keys()) == 4
    save_file(renamed, tmp_path / "state", header)
    expected = model(TOKENS[:, :3], past_key_values=load_state(whole, model)).logits
    found = model(TOKENS[:, :3], past_key_values=load_state(tmp_path / "state", model)).logits
    assert torch.equal(found, expected)


def test_the_file_is_as_open_as_any(whole):
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(whole.stat().st_mode) == 0o666 & ~umask
