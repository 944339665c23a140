"""Tiny tokenizers, checkpoints and inputs, random and seeded."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from supra.conversion.plan import plan_layers
from supra.conversion.tensors import load_converted
from supra.conversion.untrained import untrained_plan
from supra.data.vocabulary import END, learn_tokenizer
from supra.mixers import AttentionShape, MixerInputs, resolve_mixer

VOCABULARY = 300
MAIN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")

_TEXT = [
    "The river rises in the hills and runs south through the valley to the sea.",
    "A model reads one token at a time and keeps a state of fixed size.",
    "Who sees the whole page at once has no need to remember it.",
    "In 1843 the bridge was built of 20,000 stones; it stands to this day.",
]


def tiny_tokenizer(folder: str | Path, template: str = "$A") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 300 tokens, for any text; saved in `folder`.

    template: the special tokens around a text, such as "<bos> $A"; they are added to the
        vocabulary. "<|endoftext|>" is always in it, as bos, eos and pad token.
    """
    added = [x for x in template.split() if x not in ("$A", END)]
    tokenizer = learn_tokenizer(_TEXT, VOCABULARY, template, added)
    tokenizer.save_pretrained(folder)
    return tokenizer


# Under the names of all families; a config takes the fields that it knows.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "sliding_window": 9,
    # With the usual 0.02, outputs would be so close to zero that wrong ones would look right.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {"num_key_value_heads": 6, "head_dim": 4}
_FAMILY_SIZES = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), _LATENT),
    "minicpm3": _LATENT,
    "mimo_v2_flash": {"num_key_value_heads": 1, "v_head_dim": 10},
    "modernbert-decoder": {"pad_token_id": 0},
    # without a window, unless a test asks for one
    **{family: {"sliding_window": None} for family in ("mistral", "qwen2", "qwen3")},
}


def tiny_config(family: str = "llama", **overrides):
    """A two-layer config of `family`: 6 heads of size 8, with 2 key-value heads if it supports
    that.

    The layers are of different kinds if the family has several kinds.
    """
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    known = {*default.to_dict(), *default.attribute_map}
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    sizes |= _FAMILY_SIZES.get(family, {}) | overrides
    for name in {"layer_types", "mlp_layer_types"} & known - set(overrides):
        if kinds := list(dict.fromkeys(getattr(default, name) or ())):
            count = sizes["num_hidden_layers"]
            sizes[name] = (kinds * count)[:count]
    return config_class(**sizes)


def tiny_checkpoint(
    folder: str | Path, family: str = "llama", *, seed: int = 0, **overrides
) -> PreTrainedModel:
    """A random model of `tiny_config(family, **overrides)`, saved with a tokenizer in `folder`.

    Biases and norm weights are random too. With zeros and ones, a wrong order of operations would
    give the same result.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return model.eval()


def untrained_model(
    config: PreTrainedConfig, mixer: str | None, options: dict | None = None, *, seed: int = 0
) -> PreTrainedModel:
    """A model of `config` with `mixer` in every layer: transformers' random starting values,
    converted like any checkpoint. None keeps the family's own layers. Raises UserError where
    conversion does."""
    if mixer is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config)
    mixer, options = resolve_mixer(mixer, options)
    layers = plan_layers(config.num_hidden_layers, mixer, ())
    plan = untrained_plan(config, layers, {mixer: options}, None, seed)
    return load_converted(plan, seed, progress=False)


def future_gradient(model: PreTrainedModel, tokens: int, *, seed: int = 0) -> float:
    """How much outputs depend on later tokens.

    This is the largest gradient with respect to an embedding after the output's position, divided
    by the largest one at or before it. It is zero for a causal model, or as small as the rounding
    of an FFT. A model that is not causal can read the answers from the rows it is trained on. At
    most 16 positions of one row are tried.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(1, tokens, model.config.hidden_size, generator=generator)
    embeddings = embeddings.to(model.device, model.dtype).requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[0]
    weight = torch.randn(logits.shape[-1], generator=generator).to(logits)
    worst = 0.0
    for at in range(0, tokens - 1, max(1, tokens // 16)):
        output = (logits[at] * weight).sum()
        (gradient,) = torch.autograd.grad(output, embeddings, retain_graph=True)
        size = gradient[0].abs().amax(-1)
        worst = max(worst, (size[at + 1 :].max() / size[: at + 1].max()).item())
    return worst


def mixer_inputs(shape: AttentionShape, tokens: int, *, seed: int = 0, **fields) -> MixerInputs:
    """Random float64 inputs of two rows for a mixer; `fields` replace those of MixerInputs."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(2, tokens, *sizes, generator=generator, dtype=torch.float64)

    values = {
        "hidden_states": random(shape.hidden_size),
        "query": random(shape.query_heads, shape.head_size),
        "key": random(shape.key_heads, shape.head_size),
        "value": random(shape.key_heads, shape.value_size),
        "rotary": None,
        "scaling": shape.head_size**-0.5,
        "sliding_window": None,
        "softcap": None,
        "sinks": None,
        "padding_mask": None,
        "cu_seqlens": None,
    }
    return MixerInputs(**(values | fields))
