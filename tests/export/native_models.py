"""Tiny random models of the native architectures, away from their starting values."""

import torch
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from supra.export.native import NativeModel, NativeTensor

LAYERS = ("linear_attention", "full_attention", "linear_attention")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def tiny_qwen3_5(vocabulary=300, **changes):
    """Qwen3.5's text model with two linear layers and one of attention."""
    config = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "layer_types": list(LAYERS),
        "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0, "mrope_section": [6, 5, 5]},
    }
    return away_from_start(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**config | changes)))


def tiny_granite(vocabulary=300, **changes):
    """Granite 4 with two Mamba-2 layers and one of attention, without experts."""
    config = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 96,
        "shared_intermediate_size": 96,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": [kind.replace("full_", "") for kind in LAYERS],
        "position_embedding_type": "rope",
        "rope_parameters": ROPE,
        "attention_multiplier": 0.25,
        "mamba_n_heads": 4,
        "mamba_n_groups": 4,
        "mamba_d_state": 32,
        "mamba_d_head": 32,
        "tie_word_embeddings": True,
    }
    return away_from_start(GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**config | changes)))


def away_from_start(model):
    """The model with random weights of the size that keeps activations near 1."""
    for name, weight in model.named_parameters():
        if weight.dim() >= 2 and "conv1d" not in name:
            weight.data = torch.randn_like(weight) / weight.shape[-1] ** 0.5
        else:
            weight.data += 0.2 * torch.randn_like(weight)
    return model.eval()


def native(model):
    """What an export to the model's own architecture gives."""
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    tensors = [
        NativeTensor(name, tuple(weight.shape), lambda weight=weight: weight)
        for name, weight in model.state_dict().items()
        if name != tied
    ]
    config = model.config.to_dict()
    if "mamba_n_heads" in config:  # transformers writes other names than it reads
        names = {"full_attention": "attention", "linear_attention": "mamba"}
        config["layer_types"] = [names.get(kind, kind) for kind in config["layer_types"]]
    return NativeModel(config, tensors)
