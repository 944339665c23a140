"""Models with state-space mixers, from the command that converts to the one that trains them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from supra.cli import main
from supra.evaluate import state_bytes
from supra.model.auto import converted_config
from supra.states import fork_state, load_state, save_state
from supra.testing import tiny_checkpoint, tiny_config
from supra.uptrain import load_config, train

# options, and the bytes of a layer's state for 6 heads of size 8 over 2 key heads, hidden size 48
STATES = [
    ("mamba2", {}, 6 * 8 * 8 * 4 + 3 * (2 * 8 + 2 * 8 + 6 * 8) * 4),
    ("mamba2", {"conv_size": 1}, 6 * 8 * 8 * 4),
    ("rwkv", {}, 6 * 8 * 8 * 4),
    ("rwkv", {"token_shift": True}, 6 * 8 * 8 * 4 + (2 * 8 + 2 * 8 + 6 * 8 + 48) * 4),
    ("h3", {}, 6 * 8 * 64 * 4 + 63 * 2 * 8 * 4),
    ("h3", {"head_size": 4, "d_state": 6}, 6 * 8 * 6 * 4 * 4 + 63 * 2 * 8 * 4),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    where = tmp_path_factory.mktemp("teacher")
    tiny_checkpoint(where, num_hidden_layers=3)
    lines = [f"The river rises {n} times. " * (9 - n % 7) for n in range(40)]
    (where / "text.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    return where


@pytest.fixture(scope="module", params=["mamba2", "rwkv", "h3"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(teacher, name, tmp_path_factory):
    """A hybrid, its mixers off their start: a delta hides what a convolution does wrong."""
    where = tmp_path_factory.mktemp("student")
    plan = ["--mixer", name, "--keep-attention", "1"]
    main(["convert", "--model", str(teacher), "--out", str(where / "rnn"), *plan])
    model = AutoModelForCausalLM.from_pretrained(where / "rnn")
    generator = torch.Generator().manual_seed(0)
    for parameter_name, x in model.named_parameters():
        if ".mixer." in parameter_name:
            x.data += 0.1 * torch.randn(x.shape, generator=generator)
    model.save_pretrained(where / "moved")
    return where


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "moved").eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 300, (2, 75), generator=torch.Generator().manual_seed(1))


def close(actual, expected):
    assert expected.abs().max() > 1, "the logits are too small to tell a wrong model from a right"
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_decoding_is_prefill(model, tokens):
    expected = model(tokens).logits
    cache, pieces = None, []
    for piece in tokens.split([2, 18, 1, 49, *[1] * 5], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    close(torch.cat(pieces, dim=1), expected)


def test_padded_generation_is_generation_alone(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    arguments = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(tokens, attention_mask=mask, **arguments)
    alone = model.generate(tokens[:1, 30:], **arguments)
    assert torch.equal(together[0, 75:], alone[0, 45:])


@torch.no_grad()
def test_packed_rows_are_separate_documents(model, tokens):
    lengths = (20, 1, 2, 52)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(tokens, position_ids=position_ids).logits
    for found, alone in zip(packed.split(lengths, 1), tokens.split(lengths, 1), strict=True):
        close(found, model(alone).logits)


@torch.no_grad()
def test_a_draft_can_be_taken_back(model, tokens):
    """Two rows go on from one saved prompt; tokens that are cropped leave nothing behind."""
    expected = model(tokens[:1]).logits[:, 60:]
    cache = DynamicCache()
    model(tokens[:1, :60], past_key_values=cache)
    cache.activate_past_recording()
    model(torch.cat([tokens[:1, 60:62], tokens[1:, :3]], dim=1), past_key_values=cache)
    cache.crop(-3)
    close(model(tokens[:1, 62:], past_key_values=cache).logits, expected[:, 2:])


@torch.no_grad()
def test_a_state_is_saved_and_forked(model, tokens, tmp_path):
    prompt = model(tokens[:1, :60], use_cache=True).past_key_values
    save_state(prompt, tmp_path / "prompt.safetensors")
    expected = model(tokens[:1]).logits[:, 60:]
    for cache in (fork_state(prompt, copies=2), load_state(tmp_path / "prompt.safetensors", model)):
        found = model(tokens[:1, 60:].expand(cache_rows(cache), -1), past_key_values=cache).logits
        close(found, expected.expand_as(found))


def cache_rows(cache):
    return len(cache.layers[0].state[0])


def test_gradients_are_those_of_checkpointing(folder, tokens):
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder / "moved").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for key, expected in gradients[0].items():
        assert expected.abs().max() > 0, key
        torch.testing.assert_close(gradients[1][key], expected, msg=key)


@torch.no_grad()
def test_bfloat16_keeps_the_mixer_in_float32(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder / "moved", dtype=torch.bfloat16).eval()
    dtypes = {".mixer." in key: p.dtype for key, p in model.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    output = model(tokens, use_cache=True)
    assert output.logits.isfinite().all()
    assert output.past_key_values.layers[0].state.memory.dtype == torch.float32


@torch.no_grad()
def test_a_compiled_step_has_no_graph_breaks(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    expected = model(tokens, attention_mask=mask).logits
    cache = model(tokens[:, :73], attention_mask=mask[:, :73], use_cache=True).past_key_values
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    for n in (73, 74):
        given = {"attention_mask": mask[:, : n + 1], "past_key_values": cache}
        close(step(tokens[:, n : n + 1], **given).logits[:, 0], expected[:, n])


@pytest.mark.parametrize(("name", "options", "size"), STATES)
def test_the_state_is_as_large_as_its_tensors(name, options, size):
    """Two such layers, and the kept one's keys and values of 2 heads of size 8 and its mask."""
    plan = [name, "softmax", name]
    config = converted_config(tiny_config(num_hidden_layers=3), plan, {name: options})
    for context in (1, 50):
        assert state_bytes(config, context) == 2 * size + context * (2 * 2 * 8 * 4 + 1)


def test_uptraining_brings_it_closer(teacher, folder, tmp_path):
    """Calibrated, layer by layer, then on the teacher's distribution."""
    overrides = [
        f"student={folder}/rnn", f"teacher={teacher}", f"out={tmp_path}/out",
        f"data.path={teacher}/text.jsonl", "data.sequence_length=64", "data.eval_documents=4",
        "budget.tokens=10240", "batch.size=4", "batch.accumulation=1", "precision=fp32",
        "align.share=0.5", "align.optimizer.lr=1e-3",
        "distill.share=0.5", "distill.optimizer.lr=1e-3", "distill.kl=1", "distill.next_token=0",
        "calibrate.tokens=1024", "eval.tokens=512", "checkpoint.every=1000",
    ]  # fmt: skip
    train(load_config("recipes/configs/supra.yaml", overrides))
    lines = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    for stage, key, least in (("align", "loss", 0.95), ("distill", "kl", 0.9)):
        seen = [x[key] for x in lines if x.get("stage") == stage and key in x]
        assert len(seen) == 20
        assert sum(seen[-5:]) < least * sum(seen[:5]), stage
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final")
    assert again.config.supra["layers"][1] == "softmax"
