"""A converted model behaves as a model of its family: cached, padded, packed, trained, saved."""

import functools
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

import supra.model.modeling
from supra.checkpoint.weights import ModuleReader
from supra.conversion.convert import convert
from supra.conversion.plan import plan_conversion
from supra.conversion.tensors import load_converted
from supra.errors import UserError
from supra.mixers import MIXERS, PRESETS, build_mixer, resolve_mixer
from supra.model.attention import attention_modules
from supra.model.auto import converted_config
from supra.model.cache import new_cache
from supra.testing import MAIN_FAMILIES, tiny_checkpoint, tiny_config

# pure, hybrid with attention kept in the middle, and the paper's form
PLANS = {
    "pure": {"mixer": "supra"},
    "hybrid": {"mixer": "supra", "keep_attention": [1]},
    "paper": {"mixer": "supra_paper"},
}


@pytest.fixture(scope="module", params=MAIN_FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=PLANS)
def folder(request, family, tmp_path_factory):
    """A converted random model with three layers."""
    where = tmp_path_factory.mktemp(f"{family}-{request.param}")
    overrides = {"sliding_window": 11} if family == "mistral" else {}
    tiny_checkpoint(where / "base", family, num_hidden_layers=3, **overrides)
    convert(str(where / "base"), where / "rnn", **PLANS[request.param])
    return where / "rnn"


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 300, (2, 75))


def padded(mask_row_of):
    mask = torch.ones(2, 75, dtype=torch.long)
    mask[0, :mask_row_of] = 0
    return mask


def close(actual, expected, tolerance=1e-4):
    assert expected.abs().max() > 1, "the logits are too small to tell a wrong model from a right"
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_decoding_is_prefill(model, tokens):
    """Token by token, in pieces, and in one pass: the same logits."""
    expected = model(tokens).logits
    cache, pieces = None, []
    for start, end in [(0, 20), (20, 21), (21, 70), *((n, n + 1) for n in range(70, 75))]:
        output = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    close(torch.cat(pieces, dim=1), expected)
    assert cache.get_seq_length() == 75


@torch.no_grad()
def test_a_left_padded_batch_is_its_rows_alone(model, tokens):
    mask = padded(30)
    together = model(tokens, attention_mask=mask).logits
    close(together[0, 30:], model(tokens[:1, 30:]).logits[0])
    close(together[1], model(tokens[1:]).logits[0])


def test_padded_generation_is_generation_alone(model, tokens):
    arguments = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(tokens, attention_mask=padded(30), **arguments)
    alone = model.generate(tokens[:1, 30:], **arguments)
    assert torch.equal(together[0, 75:], alone[0, 45:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_cached_generation_is_uncached(model, tokens, options):
    """transformers' own suite compares no cached beams with uncached ones."""
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        arguments = {"do_sample": False, **options, "use_cache": use_cache}
        texts.append(
            model.generate(tokens, attention_mask=padded(5), max_new_tokens=6, **arguments)
        )
    assert torch.equal(*texts)


@torch.no_grad()
def test_packed_rows_are_separate_documents(model, tokens):
    lengths = (20, 1, 54)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(tokens, position_ids=position_ids).logits
    start = 0
    for length in lengths:
        close(packed[:, start : start + length], model(tokens[:, start : start + length]).logits)
        start += length


@torch.no_grad()
def test_a_collators_bounds_need_no_positions(llama, tokens):
    model, row = AutoModelForCausalLM.from_pretrained(llama).eval(), tokens[:1]
    position_ids = torch.cat([torch.arange(20), torch.arange(55)])[None]
    bounds = {"cu_seq_lens_q": torch.tensor([0, 20, 75])}
    expected = model(row, position_ids=position_ids).logits
    close(model(row, position_ids=position_ids, **bounds).logits, expected)
    close(model(row, **bounds).logits, expected)  # rotary positions are relative
    with pytest.raises(UserError, match="pass use_cache=False"):
        model(row, past_key_values=new_cache(3), **bounds)
    with pytest.raises(UserError, match="cu_seq_lens_q describes one row, and there are 2"):
        model(tokens, **bounds)
    for wrong in ([0, 20, 70], [1, 75]):
        with pytest.raises(UserError, match=r"cu_seq_lens_q \(=. ... ..\) must go from 0 to .* 75"):
            model(row, cu_seq_lens_q=torch.tensor(wrong))


@torch.no_grad()
def test_a_mask_is_of_every_token_and_row(llama, tokens):
    model, mask = AutoModelForCausalLM.from_pretrained(llama).eval(), padded(30)
    for wrong in (mask[:, :1], mask[:, :40], torch.cat([mask, mask], dim=1), mask[:1]):
        with pytest.raises(
            UserError, match=r"attention_mask \(=. x .*\) must be 2 x 75, for the 0"
        ):
            model(tokens, attention_mask=wrong)
    caches = [model(tokens[:, :60], attention_mask=mask[:, :60]).past_key_values for _ in "ab"]
    whole, part = (
        model(tokens[:, 60:], attention_mask=given, past_key_values=cache).logits
        for given, cache in zip((mask, mask[:, 60:]), caches, strict=True)
    )
    assert torch.equal(whole, part)
    with pytest.raises(UserError, match=r"must be 2 x 76, for the 75 tokens in past_key_values"):
        model(tokens[:, :1], attention_mask=mask, past_key_values=caches[0])


@torch.no_grad()
def test_a_cache_of_another_depth_is_refused(llama, tokens):
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    for layers in (2, 4):
        close(model(tokens, past_key_values=new_cache(layers)).logits, model(tokens).logits)
        cache = model(tokens).past_key_values
        cache.layers = (cache.layers * 2)[:layers]
        with pytest.raises(UserError, match="another model's tokens"):
            model(tokens, past_key_values=cache)


def test_gradient_checkpointing_changes_no_gradient(folder, tokens):
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(tokens, attention_mask=padded(9), labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)
    assert any(".mixer." in name for name in gradients[0])


@torch.no_grad()
def test_save_and_load_change_nothing(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_supra.py").is_file()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_headless_model_and_pickle(model, folder, tokens):
    headless = AutoModel.from_pretrained(folder).eval()
    expected = model.base_model(tokens).last_hidden_state
    assert torch.equal(headless(tokens).last_hidden_state, expected)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert getattr(supra.model.modeling, type(model).__name__) is type(model)


@torch.no_grad()
def test_bfloat16_keeps_the_mixer_in_float32(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    dtypes = {".mixer." in name: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    assert model(tokens).logits.isfinite().all()


WINDOWED = ("mistral", "gemma2", "gemma3_text", "gpt_oss", "phimoe")  # softcap, sinks, mask only


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(48,), (17, 28, 3), (17, 31), (30, 18)])
@pytest.mark.parametrize("family", WINDOWED)
def test_padding_takes_no_place_in_a_window(family, chunks, tokens):
    """17 tokens, 28 of padding, 3 tokens: in one call, or in several with padding on each side."""
    model = windowed(family)
    mask = torch.ones(1, 48, dtype=torch.long)
    mask[:, 17:45] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    row, cache, start = tokens[:1, :48], new_cache(2), 0
    for size in chunks:
        some = slice(start, start + size)
        found = model(
            row[:, some],
            attention_mask=mask[:, : some.stop],
            position_ids=positions[:, some],
            past_key_values=cache,
        ).logits[:, -3:]
        start += size
    close(found, model(row[mask.bool()][None]).logits[:, -3:])


@functools.cache
def windowed(family):
    """A model of two layers with a window of 9 tokens; the first layer keeps attention."""
    config = tiny_config(family, sliding_window=9)
    if getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention"] * 2
    base = AutoModelForCausalLM.from_config(config)
    plan = ["softmax", "mamba2"]
    plan = plan_conversion(ModuleReader(base), config, plan, {n: {} for n in plan}, None)
    return load_converted(plan, 0, progress=False).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    where = tmp_path_factory.mktemp("llama")
    tiny_checkpoint(where / "base", num_hidden_layers=3)
    convert(str(where / "base"), where / "rnn", mixer="supra", keep_attention=[2])
    return where / "rnn"


def test_an_empty_cache_of_another_kind_is_adopted(llama, tokens):
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    expected = model.generate(tokens, max_new_tokens=5, do_sample=False)
    for options in ({"past_key_values": DynamicCache()}, {"cache_implementation": "static"}):
        text = model.generate(tokens, max_new_tokens=5, do_sample=False, **options)
        assert torch.equal(text, expected)


@pytest.mark.parametrize("options", [{}, {"keep_attention": [1]}], ids=["pure", "hybrid"])
@torch.no_grad()
def test_a_compiled_step_has_no_graph_breaks(tmp_path, tokens, options):
    """Two graphs in all: one for the first length, one for any."""
    tiny_checkpoint(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "rnn", mixer="supra", **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "rnn").eval()
    mask = padded(9)
    expected = model(tokens, attention_mask=mask).logits
    cache = model(tokens[:, :60], attention_mask=mask[:, :60], use_cache=True).past_key_values
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    for n in range(60, 75):
        found = step(
            tokens[:, n : n + 1], attention_mask=mask[:, : n + 1], past_key_values=cache
        ).logits
        close(found[:, 0], expected[:, n])
    assert counter.frame_count <= 2


def test_what_cannot_work_says_so(llama, tokens):
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    with pytest.raises(UserError, match=r"attention_mask must be \[batch, tokens\]"):
        model(tokens, attention_mask=torch.ones(2, 1, 75, 75))
    positions = torch.arange(75)[None] % 30
    for options in ({"use_cache": True}, {"past_key_values": new_cache(3)}):
        with pytest.raises(UserError, match="pass use_cache=False"):
            model(tokens, position_ids=positions, **options)
    foreign = DynamicCache()
    foreign.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
    with pytest.raises(UserError, match="another model's tokens"):
        model(tokens, past_key_values=foreign)
    with pytest.raises(UserError, match="continuous batching"):
        model.init_continuous_batching()


@torch.no_grad()
def test_embeddings_are_read_in_place_of_tokens(llama, tokens):
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    names = list(inspect.signature(model.base_model.forward).parameters)
    assert names[:-1] == list(inspect.signature(LlamaModel.forward).parameters)[1:-1]
    embeddings, positions = model.get_input_embeddings()(tokens), torch.arange(75)[None] % 30
    for more in ({}, {"position_ids": positions}, {"attention_mask": padded(30)}):
        expected = model(tokens, **more).logits
        close(model(inputs_embeds=embeddings, **more).logits, expected)
    with pytest.raises(UserError, match="pass one of them"):
        model.base_model()


def test_gradient_checkpointing_is_read_from_the_config(llama):
    config = AutoConfig.from_pretrained(llama)
    config.gradient_checkpointing = True
    assert AutoModelForCausalLM.from_config(config).is_activation_checkpointing


def test_tensor_parallelism_leaves_attention_whole(llama):
    """Sharded projections would hand a mixer fewer heads than it has parameters for."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert "model.layers.*.mlp.up_proj" in model.tp_plan
    assert not any("self_attn" in name for name in model.tp_plan)


def test_attention_stays_the_mixers(llama):
    model = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    model.set_attn_implementation("sdpa")
    model.config._attn_implementation = "eager"
    assert model.config._attn_implementation == "supra"
    assert not model.is_backend_compatible()


def test_loading_is_strict(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    model = AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    missing = next(name for name in tensors if ".mixer." in name)
    save_file({k: v for k, v in tensors.items() if k != missing}, tmp_path / "model.safetensors")
    for auto in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(UserError, match=r"1 missing keys .* first .*mixer"):
            auto.from_pretrained(tmp_path)
    save_file(tensors | {"stray": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"1 unexpected keys .* first stray"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_newer_format_is_refused(llama, tmp_path):
    config = AutoConfig.from_pretrained(llama)
    config.supra["format_version"] = 99
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="format_version 99"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_plan_of_other_layers_is_refused(llama, tmp_path):
    config = AutoConfig.from_pretrained(llama)
    config.supra["layers"].pop()
    with pytest.raises(UserError, match="plans 2 layers and has num_hidden_layers 3"):
        AutoModelForCausalLM.from_config(config)


def test_tokenizer_comes_along(llama):
    assert AutoTokenizer.from_pretrained(llama)("the sea").input_ids


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_remote_code_needs_no_import(llama):
    code = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(llama)!r}, trust_remote_code=True)
print(type(model).__module__, type(model).__name__)
"""
    assert run(code).stdout.strip() == "supra.modeling SupraLlamaForCausalLM"


def test_without_supra_the_checkpoint_says_what_to_install(llama):
    code = f"""
import sys
sys.modules["supra"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(llama)!r}, trust_remote_code=True)
"""
    result = run(code)
    assert result.returncode != 0
    assert "pip install supra-rnn, then" in result.stderr


def test_import_is_light():
    heavy = ["triton", "datasets", "peft"]
    code = f"import supra, sys; print([name for name in {heavy} if name in sys.modules])"
    assert run(code).stdout.strip() == "[]"


@pytest.mark.parametrize("mixer", [name for name in (*MIXERS, *PRESETS) if name != "supra_paper"])
def test_a_new_model_has_every_mixers_starting_values(mixer):
    """Also of mixers whose tensors all are in parts of theirs."""
    name, options = resolve_mixer(mixer)
    config = converted_config(tiny_config("llama"), [name] * 2, {name: options})
    model = AutoModelForCausalLM.from_config(config)
    for attention in attention_modules(model):
        expected = build_mixer(name, attention.mixer.shape, options)
        expected.reset_parameters()
        for key, value in expected.state_dict().items():
            assert torch.equal(attention.mixer.state_dict()[key], value), key


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma3_text", "deepseek_v3"])
def test_the_familys_own_classes_refuse_it(family, tmp_path):
    """They would ignore the mixers and only warn."""
    tiny_checkpoint(tmp_path / "base", family)
    convert(tmp_path / "base", tmp_path / "rnn", mixer="supra")
    for auto, names in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (AutoModel, MODEL_MAPPING_NAMES),
    ):
        auto.from_pretrained(tmp_path / "rnn").save_pretrained(tmp_path / "saved")
        for folder in ("rnn", "saved"):
            with pytest.raises(ValueError, match="import supra, then AutoModelForCausalLM"):
                getattr(transformers, names[family]).from_pretrained(tmp_path / folder)
        assert auto.from_pretrained(tmp_path / "saved").config._attn_implementation == "supra"
