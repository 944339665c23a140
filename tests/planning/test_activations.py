"""What autograd keeps: by formula, by counting without memory, and in a real step."""

import pytest
import torch

from supra.checkpoint.config_rules import meta_model
from supra.errors import UserError
from supra.mixers import resolve_mixer
from supra.model.auto import converted_config
from supra.planning.activations import count_end_to_end, count_layerwise
from supra.testing import tiny_config, untrained_model

TOKENS = 37
D, QUERY, KEY, HEADS, INNER = 48, 48, 16, 6, 80  # channels of tiny_config()


def meta(mixer, family="llama"):
    base = tiny_config(family)
    name, options = resolve_mixer(mixer)
    return meta_model(converted_config(base, [name] * base.num_hidden_layers, {name: options}))


def test_a_block_of_llama_with_mamba2():
    """The formula of docs/guides/plan.md, in bytes per token under bf16."""
    kept = count_end_to_end(meta("mamba2"), TOKENS, torch.bfloat16)
    block = {
        "norms": 2 * (8 * D + 4),
        "projections": 6 * D + 2 * QUERY,
        "mixer": 6 * D + 2 * (QUERY + 2 * KEY) + 30 * QUERY + 12 * HEADS,
        "feed-forward": 4 * D + 8 * INNER,
    }
    assert kept.layers == [{part: TOKENS * size for part, size in block.items()}] * 2
    assert kept.layer_input == TOKENS * 4 * D  # the residual stream is float32


def test_layers_alone_keep_what_they_keep_together():
    together = count_end_to_end(meta("mamba2"), TOKENS, torch.bfloat16)
    alone = count_layerwise(meta("mamba2"), TOKENS, torch.bfloat16, matrices=False)
    for ours, theirs in zip(alone.layers, together.layers, strict=True):
        assert ours == {part: theirs[part] for part in ours}
    matrices = count_layerwise(meta("mamba2"), TOKENS, torch.bfloat16, matrices=True)
    for ours, theirs in zip(matrices.layers, alone.layers, strict=True):
        assert ours.pop("attention matrix") > 4 * HEADS * TOKENS**2
        assert ours == theirs


@pytest.mark.parametrize("mixer", ["mamba2", "window", "gated_deltanet"])
def test_a_real_pass_keeps_as_much(mixer):
    """Bytes of all saved tensors but the weights themselves."""
    rows = 3
    model = untrained_model(tiny_config(), mixer).eval()
    tensors = (*model.parameters(), *model.buffers())
    own = {x.untyped_storage().data_ptr() for x in tensors}
    saved = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes(), x
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.base_model(torch.zeros(rows, TOKENS, dtype=torch.int64), use_cache=False)
    real = sum(size for size, _ in saved.values())
    kept = count_end_to_end(meta(mixer), TOKENS, torch.bfloat16)
    counted = kept.fixed + rows * (kept.all_layers + kept.outside)
    assert counted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_are_refused(family):
    with pytest.raises(UserError, match="mixture of experts"):
        count_end_to_end(meta("mamba2", family), TOKENS, torch.bfloat16)
