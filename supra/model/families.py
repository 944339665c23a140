"""Which families of transformers convert, and why others do not.

A family converts if tests/model/test_families.py shows that the swap loses nothing. Others might
convert into a wrong model without any error, so they are refused. docs/families.md is generated
from this file:

    python -m supra.model.families > docs/families.md
"""

# fmt: off
FAMILIES = (
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "biogpt", "bitnet", "cohere",
    "cohere2", "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma", "gemma2",
    "gemma3_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode",
    "gpt_neox", "gpt_oss", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
    "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
    "hyperclovax", "internlm3", "iquestcoder", "jais2", "kolibri1", "laguna", "llama",
    "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral",
    "ministral3", "mistral", "mixtral", "modernbert-decoder", "nanochat", "nemotron", "olmo",
    "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
    "vaultgemma", "youtu",
)

# What the probe in supra/model/attention.py cannot see:

# q and k are normalised or joined from parts after their rotation: mixers get them rotated
ROTATE_THEMSELVES = (
    "axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "minicpm3", "youtu",
)

# the window is only in the masks: the attention function is not told
WINDOW_IN_MASK = ("phimoe",)

# recurrent in transformers itself, and in the words of mixers through supra/model/native
NATIVE = (
    "bamba", "falcon_h1", "granitemoehybrid", "mamba2", "qwen3_5", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
)

_RECURRENT = "some or all of its layers are recurrent already"
_REASONS = {
    "the language model is a part of it: take a checkpoint of the language model alone": (
        "blt", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified",
        "git", "got_ocr2", "llama4", "mllama", "moshi", "moss_transcribe_diarize", "musicgen",
        "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp",
    ),
    "its attention is bidirectional or reads a second text, which no state can carry": (
        "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot",
        "blenderbot-small", "camembert", "data2vec-text", "electra", "ernie", "marian",
        "mbart", "megatron-bert", "mvp", "pegasus", "plbart", "prophetnet", "reformer",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr",
        "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
    ),
    "its attention does not go through the attention interface of transformers": (
        "bloom", "codegen", "cpmant", "ctrl", "doge", "falcon", "gpt_neo",
        "gpt_neox_japanese", "gptj", "mpt", "openai-gpt", "xglm",
    ),
    _RECURRENT: (
        "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid",
        "inkling2_text", "inkling_text", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3",
        "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm",
        "zamba", "zamba2", "zaya",
    ),
    "a learned index chooses the tokens that its attention sees": (
        "axk2", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm_moe_dsa", "hy_v4",
        "minimax_m3_vl_text",
    ),
    "its layers share keys and values": (
        "gemma3n_text", "gemma4_assistant", "gemma4_text", "gemma4_unified_assistant",
        "gemma4_unified_text",
    ),
    "its layers call attention twice": ("diffllama", "longcat_flash"),
    "its layers run several times per token": ("hrm_text",),
    "its attention heads are experts, chosen anew for every token": ("jetmoe",),
    "its language model does not call the headless model": ("llama4_text", "opt"),
    "its checkpoints have the model_type gpt2, which converts": ("gpt-sw3",),
    "no model can be built from the defaults of its config": ("cohere_compass_text", "dbrx"),
}
# fmt: on

REFUSED = {family: reason for reason, families in _REASONS.items() for family in families}


def refusal(family: str) -> str:
    """Why a family does not convert, in one line."""
    reason = REFUSED.get(family, "no test has shown that it loses nothing")
    more = f"{len(FAMILIES)} families do: docs/families.md"
    if family in NATIVE:
        more += "; supra diagnose, supra eval and the stage extend take this one as it is"
    return f"model_type {family!r} does not convert: {reason} ({more})"


def no_mixer(family: str) -> str:
    """The message for a model without a recurrent mixer; `family` is its model_type."""
    if family == "supra":
        return (
            "all layers of the model keep softmax attention: convert its teacher again, with "
            "another mixer in some of them"
        )
    if family in FAMILIES:
        return "the model has no mixers: run `supra convert` on it first"
    return f"the model has no mixers, and {refusal(family)}"


def no_states(family: str) -> str:
    """The message for a model without recurrent states that supra can read."""
    if REFUSED.get(family) != _RECURRENT:
        return no_mixer(family)
    return (
        f"supra cannot read the recurrent states of model_type {family!r}: it reads those of "
        f"converted models and of {', '.join(NATIVE)}, with hidden_act silu"
    )


def table() -> str:
    """docs/families.md"""
    lines = [
        "# Families",
        "",
        "Every `model_type` with a causal language model in transformers, whether it converts, and",
        "if not, why. A tiny random model of each that does goes through",
        "`tests/model/test_families.py`: with the `softmax` mixer its logits and its generated",
        "text are the original's, padded or not; with `supra` it decodes as it prefills, pads,",
        "packs, saves and loads.",
        "",
        f"{len(FAMILIES)} convert, {len(REFUSED)} do not. "
        "This page: `python -m supra.model.families`.",
        "",
        "| model_type | converts |",
        "| --- | --- |",
    ]
    found = dict.fromkeys(FAMILIES, "yes") | {x: f"no: {why}" for x, why in REFUSED.items()}
    lines += [f"| `{family}` | {found[family]} |" for family in sorted(found)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
