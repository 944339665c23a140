"""Tiny models that are recurrent in transformers itself, with random weights."""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from supra.testing import VOCABULARY, tiny_tokenizer

_SHARED = {"vocab_size": VOCABULARY, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 0,
           "eos_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40,
              "max_position_embeddings": 512}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8,
          "mamba_n_groups": 2, "mamba_chunk_size": 16}  # fmt: skip
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
          "linear_value_head_dim": 6, "head_dim": 8}  # fmt: skip
_KINDS = ["linear_attention", "full_attention"]
SIZES = {
    "mamba2": {"num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "expand": 2,
               "state_size": 8, "n_groups": 2, "chunk_size": 16},
    "bamba": {**_ATTENTION, **_MAMBA, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_ATTENTION, **_MAMBA, "num_hidden_layers": 2, "layer_types": _KINDS,
                         "num_local_experts": 4, "num_experts_per_tok": 2,
                         "shared_intermediate_size": 24},
    "falcon_h1": {**_ATTENTION, **_MAMBA, "num_hidden_layers": 2, "head_dim": 8,
                  "mamba_d_ssm": 64},
    "qwen3_next": {**_ATTENTION, **_DELTA, "num_hidden_layers": 2, "layer_types": _KINDS,
                   "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                   "shared_expert_intermediate_size": 24},
    "qwen3_5_text": {**_ATTENTION, **_DELTA, "num_hidden_layers": 2, "layer_types": _KINDS},
}  # fmt: skip


def native_model(family, dtype=torch.float32, seed=0, **overrides):
    """A model of `family` whose weights are far from their starting values."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**_SHARED, **SIZES[family] | overrides)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def native_checkpoint(folder, family):
    """The model and a tokenizer in a folder."""
    native_model(family).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder
