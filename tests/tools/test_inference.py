"""What is built on transformers takes a converted model: pipelines, servers, offloading, 8 bits."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TextIteratorStreamer,
    TorchAoConfig,
    pipeline,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from supra.conversion.convert import convert
from supra.mixers import MIXERS, PRESETS
from supra.testing import MAIN_FAMILIES, tiny_checkpoint, tiny_config, untrained_model

PROMPTS = ["The river", "A model reads one token at a time", "In 1843"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One teacher and what it converts to."""
    where = tmp_path_factory.mktemp("tools")
    tiny_checkpoint(where / "teacher", num_hidden_layers=3)
    tokenizer = AutoTokenizer.from_pretrained(where / "teacher")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(where / "teacher")
    convert(str(where / "teacher"), where / "supra", mixer="supra")
    convert(str(where / "teacher"), where / "hybrid", mixer="supra", keep_attention=[1])
    return where


@pytest.fixture(scope="module", params=["supra", "hybrid"])
def folder(folders, request):
    return folders / request.param


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, padding_side="left")


def continuation(model, tokenizer, prompt, **arguments):
    """The prompt's continuation by `generate`, alone in its batch."""
    encoded = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**encoded, **(GREEDY | arguments))
    return tokenizer.decode(output[0, encoded.input_ids.shape[1] :], skip_special_tokens=True)


def test_pipeline_is_generate(folder, model, tokenizer):
    generator = pipeline("text-generation", model=str(folder))
    for prompt in PROMPTS:
        (result,) = generator(prompt, **GREEDY)
        assert result["generated_text"] == prompt + continuation(model, tokenizer, prompt)


def test_a_batched_pipeline_pads(model, tokenizer):
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=3)
    results = generator(PROMPTS, return_full_text=False, **GREEDY)
    expected = [continuation(model, tokenizer, prompt) for prompt in PROMPTS]
    assert [r[0]["generated_text"] for r in results] == expected


def test_chat_through_the_pipeline(folder, model, tokenizer):
    messages = [{"role": "user", "content": "Where does it rise?"}]
    (result,) = pipeline("text-generation", model=str(folder))(messages, **GREEDY)
    *told, answer = result["generated_text"]
    assert told == messages and answer["role"] == "assistant"
    prompt = "user: Where does it rise?\nassistant:"
    assert answer["content"] == continuation(model, tokenizer, prompt)


def test_streaming(model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    encoded = tokenizer(PROMPTS[1], return_tensors="pt")
    thread = threading.Thread(
        target=model.generate, kwargs={**encoded, **GREEDY, "streamer": streamer}
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 3
    assert "".join(pieces) == continuation(model, tokenizer, PROMPTS[1])


def test_several_end_tokens(model, tokenizer):
    """Rows of a batch end at different tokens; what follows is padding."""
    encoded = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    start = encoded.input_ids.shape[1]
    free = model.generate(**encoded, **GREEDY, eos_token_id=None)[:, start:]
    ends = [free[0, 3].item(), free[1, 5].item()]
    output = model.generate(**encoded, **GREEDY, eos_token_id=ends, pad_token_id=0)[:, start:]
    for row, whole in zip(output, free, strict=True):
        at = next((i for i, token in enumerate(whole) if token.item() in ends), len(whole) - 1)
        assert torch.equal(row[: at + 1], whole[: at + 1])
        assert not row[at + 1 :].any()
    assert output.shape[1] < len(whole) or (output == 0).any()


# Offloading: a layer's parameters are on the meta device but for the time of its own forward.

TOKENS = torch.arange(1, 61).reshape(2, 30)


@pytest.fixture(scope="module", params=MAIN_FAMILIES)
def any_family(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    tiny_checkpoint(where / "base", request.param, num_hidden_layers=3)
    convert(str(where / "base"), where / "rnn", mixer="supra", keep_attention=[1])
    return where / "rnn"


def on_disk(folder, offload_folder):
    """The first two layers on the disk, the rest in memory."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    prefix = plain.base_model_prefix
    parts = [f"{prefix}.{name}" for name, _ in plain.base_model.named_children()]
    layers = [f"{prefix}.layers.{n}" for n in range(3)]
    device_map = dict.fromkeys([*parts, "lm_head", layers[2]], "cpu")
    del device_map[f"{prefix}.layers"]
    device_map |= dict.fromkeys(layers[:2], "disk")
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=offload_folder
    )


def in_memory(folder, offload_folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return cpu_offload(model, execution_device=torch.device("cpu"))


@torch.no_grad()
@pytest.mark.parametrize("offload", [on_disk, in_memory])
def test_offloading_changes_nothing(any_family, offload, tmp_path):
    """Parameters that are read outside their module's forward would be silently wrong."""
    plain = AutoModelForCausalLM.from_pretrained(any_family).eval()
    offloaded = offload(any_family, tmp_path).eval()
    away = [name for name, x in offloaded.named_parameters() if x.device.type == "meta"]
    assert any(".0." in name and ".mixer." in name for name in away)
    expected = plain(TOKENS).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(offloaded(TOKENS).logits, expected, atol=1e-5, rtol=0)
    mask = torch.ones_like(TOKENS)
    mask[0, :7] = 0
    texts = [m.generate(TOKENS, attention_mask=mask, **GREEDY) for m in (plain, offloaded)]
    assert torch.equal(*texts)


@torch.no_grad()
@pytest.mark.parametrize("mixer", [*MIXERS, *PRESETS])
def test_every_mixer_runs_offloaded(mixer):
    model = untrained_model(tiny_config("llama"), mixer).eval()
    text = {"max_new_tokens": 3, "do_sample": False}
    expected = model(TOKENS).logits, model.generate(TOKENS, **text)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(TOKENS).logits, expected[0])
    assert torch.equal(model.generate(TOKENS, **text), expected[1])


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(folder, model, device_map):
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).eval()
    device = loaded.device
    torch.testing.assert_close(
        loaded(TOKENS.to(device)).logits.cpu(), model(TOKENS).logits, atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_a_device_map_by_memory_spills_to_the_disk(folder, model, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": "200KB"}, offload_folder=tmp_path
    )
    assert "disk" in loaded.hf_device_map.values()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=0)


# Half and eight bits: the mixers stay float32.


def dtypes(model):
    found = {}
    for name, parameter in model.named_parameters():
        found.setdefault(".mixer." in name, set()).add(parameter.dtype)
    return found


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder, model, dtype):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    assert dtypes(half) == {True: {torch.float32}, False: {dtype}}
    assert correlation(half, model) > 0.999


@torch.no_grad()
@pytest.mark.parametrize("family", ["beam", "deepseek_v3"])
def test_what_the_family_keeps_in_float32_stays(family, tmp_path):
    """Routers, whether they are cast by the conversion or on loading."""
    tiny_checkpoint(tmp_path / "base", family)
    convert(str(tmp_path / "base"), tmp_path / "copied", mixer="softmax")
    convert(str(tmp_path / "base"), tmp_path / "cast", mixer="softmax", dtype=torch.bfloat16)
    base, *students = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16).eval()
        for name in ("base", "copied", "cast")
    )
    expected = base.state_dict()
    assert {x.dtype for x in expected.values()} == {torch.float32, torch.bfloat16}
    for student in students:
        for name, tensor in student.state_dict().items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
        found, wanted = (model(TOKENS).logits for model in (student, base))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_quantisation_leaves_mixers_alone(model):
    patterns = list(model._keep_in_fp32_modules)
    assert not should_convert_module("model.layers.0.self_attn.mixer.gate_proj", patterns)
    assert should_convert_module("model.layers.0.self_attn.q_proj", patterns)


def correlation(quantised, model):
    """Of the logits, over a batch."""
    pair = torch.stack([m(TOKENS).logits.float().flatten() for m in (quantised, model)])
    return torch.corrcoef(pair)[0, 1].item()


@torch.no_grad()
@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_eight_bits(folder, model, library, tmp_path):
    pytest.importorskip(library, reason=f"needs {library}")
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    small = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    ).eval()
    projection = small.model.layers[0].self_attn.q_proj
    assert type(projection.weight).__name__ != "Parameter"
    assert all(x.dtype == torch.float32 for n, x in small.named_parameters() if ".mixer." in n)
    assert correlation(small, model) > 0.99


# transformers serve, of which `transformers chat` is a client


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(folders):
    """`supra serve` with the converted model; its address."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="transformers serve needs transformers[serving]")
    port = free_port()
    command = "import sys; from supra.serving.http import serve; serve(sys.argv[1:])"
    arguments = [str(folders / "supra"), "--device", "cpu", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = f"http://localhost:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                pytest.fail(process.stdout.read())
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_serve(folders, server):
    messages = [{"role": "user", "content": "Where does it rise?"}]
    request = {
        "model": str(folders / "supra"),
        "messages": messages,
        "max_tokens": 12,
        "temperature": 0,
    }
    answer = urllib.request.urlopen(
        urllib.request.Request(
            f"{server}/v1/chat/completions",
            json.dumps(request).encode(),
            {"Content-Type": "application/json"},
        ),
        timeout=60,
    )
    text = json.load(answer)["choices"][0]["message"]["content"]
    model = AutoModelForCausalLM.from_pretrained(folders / "supra")
    tokenizer = AutoTokenizer.from_pretrained(folders / "supra")
    prompt = "user: Where does it rise?\nassistant:"
    assert text == continuation(model, tokenizer, prompt)
