"""The names and shapes that vLLM and SGLang ask of a model's files, read in their sources.

    vLLM     vllm/model_executor/models/qwen3_5.py                 commit 00def4f8
             vllm/model_executor/models/qwen3_next.py                     002d6073
             vllm/model_executor/layers/mamba/gdn_linear_attn.py          0218d050
             vllm/model_executor/models/granitemoehybrid.py               0195c9ec
             vllm/model_executor/layers/mamba/mamba_mixer2.py             004d4e4c
    SGLang   python/sglang/srt/models/qwen3_5.py                          005fa711
             python/sglang/srt/configs/qwen3_5.py                         0f6f0002
             python/sglang/srt/models/granitemoehybrid.py                 008b79d2
             python/sglang/srt/configs/granitemoehybrid.py                7f1ce9b5

Both engines join tensors when they load them: q, k and v; gate and up; qkv and z; b and a. The
names and shapes here are those before joining. Neither allows a bias in these layers, except in
Granite's convolution.
"""

from typing import Any

Shapes = dict[str, tuple[int, ...]]


def asked(config: dict[str, Any]) -> Shapes:
    """Every tensor that both engines read for a model of this config.json."""
    of_layer = {"qwen3_5_text": _qwen3_5, "granitemoehybrid": _granite}[config["model_type"]]
    words, hidden = config["vocab_size"], config["hidden_size"]
    found = {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (words, hidden)
    for layer, kind in enumerate(config["layer_types"]):
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        shapes = dict.fromkeys(norms, (hidden,)) | of_layer(config, kind)
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    return found


def _qwen3_5(c: dict[str, Any], kind: str) -> Shapes:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    mlp = {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if kind == "full_attention":
        norms = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
        return mlp | _attention(c, gates=1) | dict.fromkeys(norms, (c["head_dim"],))
    heads = c["linear_num_value_heads"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    values = heads * c["linear_value_head_dim"]
    return mlp | {
        "linear_attn.in_proj_qkv.weight": (2 * keys + values, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, c["linear_conv_kernel_dim"]),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.A_log": (heads,),
        "linear_attn.norm.weight": (c["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def _granite(c: dict[str, Any], kind: str) -> Shapes:
    hidden, inner = c["hidden_size"], c["shared_intermediate_size"]
    mlp = {
        "shared_mlp.input_linear.weight": (2 * inner, hidden),
        "shared_mlp.output_linear.weight": (hidden, inner),
    }
    if kind == "attention":
        return mlp | _attention(c, gates=0)
    heads, values = c["mamba_n_heads"], c["mamba_expand"] * hidden
    channels = values + 2 * c["mamba_n_groups"] * c["mamba_d_state"]
    return mlp | {
        "mamba.in_proj.weight": (values + channels + heads, hidden),
        "mamba.conv1d.weight": (channels, 1, c["mamba_d_conv"]),
        "mamba.conv1d.bias": (channels,),
        "mamba.dt_bias": (heads,),
        "mamba.A_log": (heads,),
        "mamba.D": (heads,),
        "mamba.norm.weight": (values,),
        "mamba.out_proj.weight": (hidden, values),
    }


def _attention(c: dict[str, Any], gates: int) -> Shapes:
    """gates: 1 if the query's projection has a gate for every channel as well."""
    hidden = c["hidden_size"]
    size = c.get("head_dim", hidden // c["num_attention_heads"])
    queries, keys = (c[f"num_{name}_heads"] * size for name in ("attention", "key_value"))
    return {
        "self_attn.q_proj.weight": ((1 + gates) * queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
    }
