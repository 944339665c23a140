"""Which layers keep attention: shares and their spacing, and costs by the plain formula."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from supra.checkpoint.opening import find_checkpoint
from supra.conversion import layer_choice
from supra.conversion.calibrate import calibrate
from supra.conversion.layer_choice import (
    choose_layers,
    costliest,
    divergences,
    evenly_spaced,
    layer_costs,
    left_by_greed,
    parse_share,
    read_blocks,
    read_share,
)
from supra.data.packing import IGNORE, collate, pack, shifted_labels
from supra.errors import UserError
from supra.mixers import build_mixer, resolve_mixer
from supra.model.attention import attention_modules
from supra.model.auto import converted_config
from supra.testing import tiny_checkpoint, tiny_config, tiny_tokenizer
from tests.data.documents import whole

LAYERS = 4


@pytest.mark.parametrize(
    ("layers", "share", "kept"),
    [
        (12, 0.25, [2, 6, 10]),
        (32, 0.125, [4, 12, 20, 28]),
        (3, 0.25, [1]),
        (3, 0.67, [0, 2]),
        (7, 0.4, [1, 3, 5]),
        (7, 0.3, [1, 5]),
        (30, 0.1, [5, 15, 25]),
        (5, 0.99, [0, 1, 2, 3, 4]),
        (1, 0.5, [0]),
        (24, 0.001, [12]),
    ],
)
def test_a_share_is_evenly_spaced(layers, share, kept):
    assert evenly_spaced(layers, share) == kept


def test_spacing_is_as_even_as_can_be():
    """Gaps differ by at most one layer, and the margins before the first kept layer and after the
    last differ by at most one."""
    for layers in range(2, 40):
        for count in range(1, layers):
            kept = evenly_spaced(layers, count / layers)
            gaps = {after - before for before, after in pairwise(kept)}
            assert len(kept) == count
            assert not gaps or max(gaps) - min(gaps) <= 1
            assert 0 <= kept[0] - (layers - 1 - kept[-1]) <= 1


@pytest.mark.parametrize(
    ("costs", "share", "kept"),
    [
        ([0.1, 0.4, 0.2, 0.3], 0.5, [1, 3]),
        ([0.1, 0.4, 0.2, 0.3, 0.0], 0.5, [1, 3]),
        ([0.3, 0.1, 0.2], 0.1, [0]),
        ([0.0, 0.0, 0.0], 0.67, [0, 1]),
    ],
)
def test_the_costliest_in_order(costs, share, kept):
    assert costliest(costs, share) == kept


@pytest.mark.parametrize(
    ("text", "share"), [("0.25", 0.25), ("25%", 0.25), ("12.5%", 0.125), (".5", 0.5)]
)
def test_share_in_words(text, share):
    assert parse_share(text) == share
    assert read_share(f"auto:{text}", "text.txt") == (share, "auto")
    assert read_share(f"greedy:{text}", "text.txt") == (share, "greedy")
    assert read_share(share, None) == (share, None)


@pytest.mark.parametrize(
    ("keep_attention", "text", "match"),
    [
        (0.0, None, r"\(=0.0\) is a share of the layers: it must be between 0 and 1"),
        (1.0, None, r"\(=1.0\) is a share"),
        (-0.5, None, r"\(=-0.5\) is a share"),
        (float("nan"), None, r"\(=nan\) is a share"),
        ("auto:1.5", "a.txt", r"\(=auto:1.5\) is a share"),
        ("auto:100%", "a.txt", "is a share"),
        ("auto:much", "a.txt", r"\(='much'\) must be a share of the layers, such as 0.25 or 25%"),
        ("auto", "a.txt", "or auto or greedy with a share, such as auto:0.25"),
        ("auto:", "a.txt", "or auto or greedy with a share, such as auto:0.25"),
        ("3,7", None, r"\(='3,7'\) must be layer indices"),
        ("auto:0.25", None, r"\(='auto:0.25'\) needs a text"),
        ("greedy:0.25", None, r"\(='greedy:0.25'\) needs a text"),
        (0.25, "a.txt", r"text \(='a.txt'\) is only used when keep_attention is auto or greedy"),
        ([1], "a.txt", "is only used when keep_attention is auto"),
        ((), "a.txt", "is only used when keep_attention is auto"),
    ],
)
def test_choices_that_make_no_sense(keep_attention, text, match):
    with pytest.raises(UserError, match=match):
        read_share(keep_attention, text)


def converted(family="llama"):
    """A random model with the mixer `supra` in every layer."""
    config = tiny_config(family, num_hidden_layers=LAYERS)
    name, options = resolve_mixer("supra")
    torch.manual_seed(4)
    return AutoModelForCausalLM.from_config(
        converted_config(config, [name] * LAYERS, {name: options})
    ).eval()


def scaled(*scales):
    """A Llama whose output projections are multiplied by `scales`."""
    model = converted()
    for attention, scale in zip(attention_modules(model), scales, strict=True):
        attention.o_proj.weight.data *= scale
    return model


@pytest.fixture
def blocks():
    """Four packed rows, whose documents are of odd lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = (17, 60, 5, 33, 47, 90)
    documents = [torch.randint(300, (n,), generator=generator).tolist() for n in lengths]
    return list(pack(whole(documents), 63))


@pytest.mark.parametrize("others", [(), (1,), (3, 0)])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gemma2", "gpt_oss"])
def test_costs_are_the_plain_formula(family, others, blocks):
    """Whole forwards and whole float64 log-probabilities. The families' layers return tensors or
    tuples, run attention and MLP in parallel, cap logits, and alternate windows."""
    model = converted(family)
    inputs = collate(blocks)
    valid = shifted_labels(inputs.pop("labels")) != IGNORE
    costs = divergences(model, blocks, converted=others)

    attentions = attention_modules(model)
    mixers = [attention.mixer for attention in attentions]
    softmax = [build_mixer("softmax", mixer.shape, {}) for mixer in mixers]

    @torch.no_grad()
    def log_probabilities(layers):
        for index, attention in enumerate(attentions):
            attention.mixer = mixers[index] if index in layers else softmax[index]
        return model(**inputs, use_cache=False).logits.double().log_softmax(-1)[valid]

    teacher = log_probabilities(())
    for layer, cost in enumerate(costs):
        if layer in others:
            assert cost == 0
            continue
        student = log_probabilities((*others, layer))
        expected = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
        assert cost == pytest.approx(expected, rel=2e-5)  # measured: 3e-6, as logits are float32
        assert cost > 1e-3


def test_measuring_leaves_the_model_as_it_was(blocks):
    model = converted()
    mixers = [attention.mixer for attention in attention_modules(model)]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    divergences(model, blocks)
    assert [attention.mixer for attention in attention_modules(model)] == mixers
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_first_half_calibrates_and_the_second_measures(blocks):
    model, other = converted(), converted()
    half = collate(blocks[:2])
    calibrate(other, half["input_ids"], half["position_ids"])
    assert layer_costs(model, blocks) == divergences(other, blocks[2:])


def test_layers_below_are_not_computed_again(blocks):
    """The teacher runs all L layers, and so does the model with what is converted already; with
    layer n converted, too, it runs layers n to L − 1."""
    model, calls = converted(), []
    for attention in attention_modules(model):
        attention.register_forward_hook(lambda module, *_: calls.append(module.layer_idx))
    divergences(model, blocks[:1], converted=[2])
    runs = [*[range(LAYERS)] * 2, *(range(layer, LAYERS) for layer in range(LAYERS) if layer != 2)]
    assert calls == [layer for run in runs for layer in run]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_without_output_costs_nothing(dtype, blocks):
    """One layer's output projection is zero. Another's is large, and that layer costs most."""
    model = scaled(0.02, 0, 4, 1)
    for name, parameter in model.named_parameters():
        if ".mixer." not in name:
            parameter.data = parameter.data.to(dtype)
    costs = layer_costs(model, blocks)
    assert costs[1] == 0
    assert costs[2] == max(costs)
    assert min(costs[0], costs[3]) > 1e-3
    assert costliest(costs, 0.25) == [2]
    assert costliest(costs, 0.75) == [0, 2, 3]


def test_greed_measures_with_what_it_chose(blocks):
    """Every choice by the plain formula: the cost of a whole set of converted layers."""
    model = scaled(0.5, 2, 1, 1.5)
    costs, measured = layer_costs(model, blocks), blocks[len(blocks) // 2 :]

    def cost_of(layers):
        *others, last = layers
        return divergences(model, measured, converted=others)[last]

    left = [0, 1, 2, 3]
    while len(left) > 1:
        gone = [layer for layer in range(LAYERS) if layer not in left]
        left.remove(min(left, key=lambda layer: cost_of([*gone, layer])))
        assert left_by_greed(model, measured, costs, len(left) / LAYERS) == left
    assert choose_layers("greedy", model, blocks, 0.25) == (left, costs)
    assert choose_layers("auto", model, blocks, 0.5) == (costliest(costs, 0.5), costs)


def test_overflow_is_not_ranked(blocks):
    with pytest.raises(UserError, match="not finite in float32: its weights are damaged"):
        layer_costs(scaled(1, 1, float("inf"), 1), blocks)


def test_short_texts(tmp_path, monkeypatch):
    """A short text is halved; a text of less than two rows cannot be."""
    monkeypatch.setattr(layer_choice, "SEQUENCE_LENGTH", 64)
    monkeypatch.setattr(layer_choice, "TOKENS", 128)
    tokenizer = tiny_tokenizer(tmp_path)
    text = tmp_path / "text.txt"
    for words, rows in ((1000, 4), (12, 2)):
        text.write_text("zebra, fox. " * words)
        assert len(read_blocks(tokenizer, str(text), "text")) == rows
    text.write_text("zebra, fox. " * 8)
    with pytest.raises(UserError, match=r"text.txt'\) must have at least 128 tokens"):
        read_blocks(tokenizer, str(text), "text")
    with pytest.raises(UserError, match="no such file"):
        read_blocks(tokenizer, str(tmp_path / "none.txt"), "text")


def test_the_model_in_memory_is_the_one_on_disk(tmp_path):
    """Even with renamed tensors, tied embeddings and random starting values."""
    from supra.conversion.convert import convert
    from supra.conversion.plan import plan_conversion
    from supra.conversion.tensors import load_converted

    tiny_checkpoint(tmp_path / "base", "gpt_neox", tie_word_embeddings=True)
    convert(tmp_path / "base", tmp_path / "rnn", mixer="supra_paper", seed=3)
    checkpoint = find_checkpoint(str(tmp_path / "base"))
    name, options = resolve_mixer("supra_paper")
    base = checkpoint.config()
    reader = checkpoint.tensors(base)
    plan = plan_conversion(reader, base, [name] * 2, {name: options}, None)
    memory = load_converted(plan, 3, progress=False)
    disk = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn")
    tokens = torch.arange(20)[None]
    assert torch.equal(memory(tokens).logits, disk(tokens).logits)
    assert memory.dtype == disk.dtype
