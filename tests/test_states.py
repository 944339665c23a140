"""States kept, forked and taken back: a prompt is paid for once, and drafts leave no trace."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from supra.convert import convert
from supra.errors import UserError
from supra.states import fork_state, load_state, save_state
from supra.testing import tiny_checkpoint

CASES = {
    "pure": ("llama", {}),
    "hybrid": ("llama", {"keep_attention": [1]}),
    "windowed hybrid": ("gemma3_text", {"keep_attention": [0]}),
    "no rotary": ("gpt2", {}),
}


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    family, options = CASES[request.param]
    where = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    tiny_checkpoint(where / "base", family, num_hidden_layers=3)
    convert(where / "base", where / "rnn", **options)
    return where


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "rnn").eval()


@pytest.fixture(scope="module")
def teacher(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base").eval()


@pytest.fixture
def tokens():
    """A text that repeats, so that drafts by lookup are accepted in part."""
    text = torch.randint(1, 300, (1, 19))
    return torch.cat([text, text], dim=1)


def generate(model, tokens, **options):
    return model.generate(tokens, do_sample=False, **{"max_new_tokens": 20, **options})


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1, 4, 6])
def test_crop_forgets_the_last_tokens(model, tokens, kept):
    cache = model(tokens[:, :20], use_cache=True).past_key_values
    cache.activate_past_recording()
    for start, end in ((20, 21), (21, 24), (24, 26)):
        model(tokens[:, start:end], past_key_values=cache)
    cache.crop(kept - 6)
    assert cache.get_seq_length() == 20 + kept
    found = model(tokens[:, 20 + kept :], past_key_values=cache).logits
    expected = model(tokens).logits[:, 20 + kept :]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_crop_beyond_the_record_is_refused(model, tokens):
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(UserError, match=r"crop \(2 tokens\) goes back further .* recorded \(0\)"):
        cache.crop(-2)
    cache.activate_past_recording()
    model(tokens[:, :3], past_key_values=cache)
    with pytest.raises(UserError, match="crop it first"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(UserError, match=r"crop \(=3\) must be <= 0"):
        cache.crop(3)
    cache.reset()
    model(tokens[:, :3], past_key_values=cache)
    with pytest.raises(UserError, match=r"recorded \(0\)"):
        cache.crop(-1)


@pytest.mark.parametrize("draft", ["lookup", "teacher", "itself"])
def test_assisted_decoding_is_greedy_decoding(model, teacher, tokens, draft):
    options = {
        "lookup": {"prompt_lookup_num_tokens": 4},
        "teacher": {"assistant_model": teacher},
        "itself": {"assistant_model": model},
    }[draft]
    assert torch.equal(generate(model, tokens, **options), generate(model, tokens))


@torch.no_grad()
def test_recording_ends_with_assisted_decoding(model, tokens):
    options = {"return_dict_in_generate": True, "prompt_lookup_num_tokens": 4}
    cache = generate(model, tokens, **options).past_key_values
    model(tokens[:, :1], past_key_values=cache)
    assert not any(layer.record_past or layer._calls for layer in cache.layers)


def test_it_drafts_for_another_model(model, teacher, tokens):
    assert torch.equal(generate(teacher, tokens, assistant_model=model), generate(teacher, tokens))


def test_a_prompt_in_pieces_is_one_pass(model, tokens):
    assert torch.equal(generate(model, tokens, prefill_chunk_size=7), generate(model, tokens))


@torch.no_grad()
def test_a_prompt_is_read_once(model, tokens, tmp_path):
    prompt = model(tokens[:, :30], use_cache=True).past_key_values
    before = copy.deepcopy([layer.state for layer in prompt.layers])
    save_state(prompt, tmp_path / "prompt.safetensors")
    loaded = load_state(tmp_path / "prompt.safetensors", model)
    assert loaded.get_seq_length() == 30
    expected = generate(model, tokens)
    for cache in (fork_state(prompt), loaded, fork_state(prompt)):
        assert torch.equal(generate(model, tokens, past_key_values=cache), expected)
    for layer, state in zip(prompt.layers, before, strict=True):
        for found, kept in zip(layer.state, state, strict=True):
            assert (found is None and kept is None) or torch.equal(found, kept)


@torch.no_grad()
def test_a_fork_in_several_rows_is_a_batch(model, tokens):
    prompt = model(tokens[:, :30], use_cache=True).past_key_values
    endings = torch.randint(1, 300, (3, 4))
    together = model(endings, past_key_values=fork_state(prompt, copies=3)).logits
    for row, ending in zip(together, endings, strict=True):
        alone = model(ending[None], past_key_values=fork_state(prompt)).logits[0]
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_mistakes_are_named(model, teacher, tokens, tmp_path):
    with pytest.raises(UserError, match=r"cache \(=DynamicCache\) must be the past_key_values"):
        fork_state(teacher(tokens, use_cache=True).past_key_values)
    with pytest.raises(UserError, match="must be the past_key_values"):
        save_state(DynamicCache(), tmp_path / "state")
    prompt = model(tokens, use_cache=True).past_key_values
    with pytest.raises(UserError, match=r"copies \(=0\) must be >= 1"):
        fork_state(prompt, copies=0)
    with pytest.raises(UserError, match=r"nothing.safetensors cannot be read"):
        load_state(tmp_path / "nothing.safetensors", model)
    (tmp_path / "broken").write_bytes(b"no state")
    with pytest.raises(UserError, match="cannot be read as a state"):
        load_state(tmp_path / "broken", model)


@torch.no_grad()
def test_a_state_of_other_mixers_is_refused(model, folder, tokens, tmp_path):
    save_state(model(tokens, use_cache=True).past_key_values, tmp_path / "state")
    convert(folder / "base", tmp_path / "softmax", mixer="softmax")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax")
    with pytest.raises(UserError, match="other mixers"):
        load_state(tmp_path / "state", other)
