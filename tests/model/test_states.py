"""States kept, forked and taken back: a prompt is paid for once, and drafts leave no trace."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from supra.conversion.convert import convert
from supra.errors import UserError
from supra.mixers import MIXERS, PRESETS
from supra.states import fork_state, load_state, save_state
from supra.testing import tiny_checkpoint, tiny_config, untrained_model

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
    convert(where / "base", where / "rnn", mixer="supra", **options)
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
@pytest.mark.parametrize("kept", [0, 1, 3, 4, 6])  # 3 is within a call
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


@torch.no_grad()
def test_copies_of_a_state_stand_beside_it(model, tokens):
    rows = torch.cat((tokens, tokens.flip(1)))
    cache = model(rows[:, :20], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    found = model(rows[:, 20:].repeat_interleave(2, dim=0), past_key_values=cache).logits
    expected = model(rows).logits[:, 20:].repeat_interleave(2, dim=0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("copies", [1, 3])
def test_a_fork_trains_what_made_it(model, tokens, copies):
    """As if the prompt had been read for each continuation."""
    endings = torch.randint(1, 300, (copies, 4))
    prompt = model(tokens[:, :30], use_cache=True).past_key_values
    forked = model(endings, past_key_values=fork_state(prompt, copies)).logits
    rows = torch.cat([tokens[:, :30].expand(copies, -1), endings], dim=1)
    whole = model(rows, use_cache=False).logits[:, 30:]
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(x.square().mean(), parameters, materialize_grads=True)
        for x in (forked, whole)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("mixer", [*MIXERS, *PRESETS])
def test_a_state_read_with_gradients_is_forked(mixer, tokens):
    model = untrained_model(tiny_config("llama"), mixer).eval()
    prompt = model(tokens[:, :30], use_cache=True).past_key_values
    assert prompt.layers[0].state[0].requires_grad
    found = generate(model, tokens, past_key_values=fork_state(prompt), max_new_tokens=3)
    assert torch.equal(found, generate(model, tokens, max_new_tokens=3))
    assert prompt.get_seq_length() == 30


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "batch", "way_out"),
    [(1, 3, r"fork_state\(past_key_values, copies=3\)"), (2, 4, "copies=2"), (3, 1, "the rows"),
     (2, 3, "the rows that were read before")],
)  # fmt: skip
def test_a_cache_of_other_rows_is_refused(model, tokens, rows, batch, way_out):
    cache = model(tokens.expand(rows, -1), use_cache=True).past_key_values
    message = f"past_key_values hold {rows} rows and the input has {batch}: pass .*{way_out}"
    for read in (1, 5):
        with pytest.raises(UserError, match=message):
            model(tokens[:, :read].expand(batch, -1), past_key_values=cache)
    longer = torch.cat([tokens, tokens[:, :3]], dim=1).expand(batch, -1)
    with pytest.raises(UserError, match=message):
        model.generate(longer, past_key_values=cache, max_new_tokens=2)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3}])
def test_a_prompt_in_several_rows_needs_a_fork(model, tokens, options):
    options = {"do_sample": "num_beams" not in options, "max_new_tokens": 4, **options}
    prompt = model(tokens[:, :30], use_cache=True).past_key_values
    with pytest.raises(UserError, match=r"hold 1 rows and the input has 3: pass fork_state.*=3"):
        model.generate(tokens, past_key_values=fork_state(prompt), **options)
    texts = []
    for cache in (None, fork_state(prompt, copies=3)):
        torch.manual_seed(3)
        texts.append(model.generate(tokens, past_key_values=cache, **options))
    assert torch.equal(*texts)
    after = model.generate(
        tokens, past_key_values=cache.__class__(layers=[]), return_dict_in_generate=True, **options
    ).past_key_values
    with pytest.raises(UserError, match="hold 3 rows and the input has 1"):
        model(tokens[:, :1], past_key_values=after)


COVERED = {
    "the same tokens": lambda model, x: {"inputs": x[:, :30]},
    "fewer": lambda model, x: {"inputs": x[:, :29]},
    "one new token alone": lambda model, x: {"inputs": x[:, :1]},
    "embeddings": lambda model, x: {"inputs_embeds": model.get_input_embeddings()(x[:, :30])},
    "padded": lambda model, x: {"inputs": x[:, :30], "attention_mask": (x[:, :30] > 20).long()},
    "beams": lambda model, x: {"inputs": x[:, :30], "num_beams": 2},
    "lookup": lambda model, x: {"inputs": x[:, :30], "prompt_lookup_num_tokens": 3},
    "pieces": lambda model, x: {"inputs": x[:, :30], "prefill_chunk_size": 4},
}


@torch.no_grad()
@pytest.mark.parametrize("case", COVERED)
def test_a_prompt_that_the_cache_covers_is_refused(model, tokens, case):
    arguments = COVERED[case](model, tokens)
    prompt = next(iter(arguments.values())).shape[1]
    cache = model(tokens[:, :30], use_cache=True).past_key_values
    message = rf"hold 30 tokens and the prompt has {prompt}: pass the whole conversation, at least"
    with pytest.raises(UserError, match=message):
        model.generate(**arguments, past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == 30


@torch.no_grad()
def test_new_tokens_alone_go_with_the_whole_mask(model, tokens):
    expected = generate(model, tokens)
    cache = model(tokens[:, :30], use_cache=True).past_key_values
    mask = torch.ones_like(tokens)
    text = generate(model, tokens[:, 30:], past_key_values=cache, attention_mask=mask)
    assert torch.equal(text, expected[:, 30:])


@torch.no_grad()
def test_embeddings_go_on_from_a_cache(model, tokens):
    expected = generate(model, tokens)[:, tokens.shape[1] :]
    cache = model(tokens[:, :30], use_cache=True).past_key_values
    embeddings = model.get_input_embeddings()(tokens)
    text = model.generate(
        inputs_embeds=embeddings, past_key_values=cache, do_sample=False, max_new_tokens=20
    )
    assert torch.equal(text, expected)


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
