"""The stage extend on students that are recurrent in transformers itself."""

import json
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from supra import cli
from supra.errors import UserError
from supra.losses.chunked import ScoredModel
from supra.model.cache import MixerLayer, cache_length
from supra.model.native import accelerate
from supra.uptrain import tree
from supra.uptrain.end_to_end import EndToEnd
from supra.uptrain.initial_state import InitialState, check_extends
from supra.uptrain.optim import trainable
from supra.uptrain.stage_settings import ExtendConfig, OptimizerConfig
from tests.native_models import native_checkpoint, native_model
from tests.uptrain.test_extend import LENGTH, SEGMENTS, nats, rows

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


def objective(model, initial_state="zero"):
    stage = ExtendConfig(state_passing=SEGMENTS, optimizer=OptimizerConfig(clip=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.param_groups[0]["base_lr"] = 1.0
    initial = InitialState(initial_state, model, seed=0)
    return EndToEnd(
        Accelerator(cpu=True), ScoredModel(model), optimizer, stage, None, nullcontext, initial
    )


@pytest.mark.parametrize("family", ["mamba2", "bamba", "qwen3_next", "falcon_h1"])
def test_segments_are_one_long_pass(family):
    """The loss is that of transformers on the whole rows; the gradient stops between segments."""
    model, batch = native_model(family).train(), rows()
    expected = nats(model, batch).mean()
    expected.backward()
    whole = {name: x.grad for name, x in model.named_parameters()}
    model.zero_grad()
    values = objective(accelerate(model)).add_gradients([batch])
    assert values["loss"] == pytest.approx(expected.item(), abs=2e-5)
    cut = {name: x.grad for name, x in model.named_parameters()}
    norm = torch.nn.utils.get_total_norm([*cut.values()]).item()
    assert values["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0
    difference = torch.nn.utils.get_total_norm([cut[name] - x for name, x in whole.items()])
    assert difference > 1e-3 * norm


@pytest.mark.parametrize("family", ["mamba2", "bamba", "qwen3_next"])
def test_states_before_rows(family):
    """Carried: those after the last rows, whose keys are dropped; noise: as large as those. Both
    are the same after a checkpoint."""
    model, batch = accelerate(native_model(family).train()), rows()
    carried = objective(model, "carried")
    carried.add_gradients([batch])
    (kept,) = carried.initial_state.kept
    assert cache_length(kept) == SEGMENTS * LENGTH
    first = kept.layers[0].state.memory.clone()
    assert first.norm() > 0 and not first.requires_grad
    for layer in kept.layers:
        assert isinstance(layer, MixerLayer) or layer.get_seq_length() == 0
    other = InitialState("carried", model, seed=9)
    other.load_state_dicts(carried.initial_state.state_dicts())
    again = other.begin(0, 2, SEGMENTS * LENGTH)
    assert torch.equal(again.layers[0].state.memory, first)
    second = carried.add_gradients([rows(seed=1)])["loss"]
    assert cache_length(carried.initial_state.kept[0]) == 2 * SEGMENTS * LENGTH
    assert second != pytest.approx(objective(model).add_gradients([rows(seed=1)])["loss"], abs=1e-6)
    noisy = objective(model, "noise")
    noisy.fit_noise(batch)
    drawn = noisy.initial_state.begin(0, 400, SEGMENTS * LENGTH).layers[0].state.memory
    sizes = (x.square().mean((0, 2, 3)).sqrt() for x in (drawn, first))
    torch.testing.assert_close(*sizes, rtol=0.1, atol=0)
    assert torch.isfinite(torch.tensor(noisy.add_gradients([batch])["loss"]))


def test_attention_in_the_same_layer_carries_no_state():
    settings = {"state_passing": SEGMENTS, "initial_state": "carried"}
    values = {"student": "x", "data": {"path": "y", "sequence_length": LENGTH}, "out": "z"}
    config = tree.build(values | {"extend": {"tokens": 1000} | settings})
    with pytest.raises(UserError, match=r"initial_state \(=carried\).*'falcon_h1'.*zero or noise"):
        check_extends(native_model("falcon_h1"), config)


def test_no_weight_counts_as_added_by_conversion():
    """Although Mamba-2 of transformers calls its layers `mixer`."""
    model = accelerate(native_model("mamba2"))
    kinds = {kind for _, kind in trainable(model, {"extend": ExtendConfig()})}
    assert kinds == {"other"}


@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_a_run(family, tmp_path):
    """The command trains a checkpoint of transformers and writes one of transformers."""
    folder, text = native_checkpoint(tmp_path / "student", family), tmp_path / "text.jsonl"
    lines = [json.dumps({"text": "The river rises in the hills. " * (n + 9)}) for n in range(9)]
    text.write_text("\n".join(lines))
    settings = {
        "student": folder,
        "data.path": text,
        "out": tmp_path / "run",
        "data.sequence_length": LENGTH,
        "data.eval_documents": 2,
        "eval.tokens": 64,
        "budget.tokens": 2 * 2 * SEGMENTS * LENGTH,  # two steps
        "extend.state_passing": SEGMENTS,
        "precision": "fp32",
    }
    words = ["uptrain", "--config", "extend", *(f"{x}={value}" for x, value in settings.items())]
    cli.main(words)
    before, after = (
        load_file(x / "model.safetensors") for x in (folder, tmp_path / "run" / "final")
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], x) for name, x in after.items() if x.ndim > 1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert again.config.model_type == family
