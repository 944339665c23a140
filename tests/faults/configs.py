"""config.json: fields that make no model, files that are no JSON, plans of conversion, policies."""

from itertools import cycle

from tests.faults.case import (
    BINARY,
    DEEP,
    REMOVED,
    Case,
    accepted,
    copied,
    fields,
    file,
    refused,
    without,
)

CONVERT = "convert --model {model} --out {out}"
INSPECT = "inspect {model}"
EVAL = "eval text --model {model} --text {text} --sequence-length 16"
GENERATE = "generate --model {model} --prompt river --max-new-tokens 2"
STUDENT = "uptrain --config {yaml} out={out} student={model}"
TEACHER = "uptrain --config {yaml} out={out} teacher={model}"
DIAGNOSE = "diagnose {model} --text {text} --to 64 --trained-length 16"
TASK = "eval task --model {model} --task induction --lengths 12 --samples 1"
SERVE = "serve {model}"

# a source's fields -> what the line names, which is more than the field where it takes two to err
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip
LLAMA = [
    *(({name: 0}, name) for name in SIZES),
    *(({name: -8}, name) for name in SIZES),
    *(({name: "8"}, name) for name in SIZES),
    *(({name: 8.5}, name) for name in SIZES),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": [48]}, "hidden_size"),
    ({"num_hidden_layers": None}, "num_hidden_layers"),
    ({"vocab_size": None}, "vocab_size"),
    ({"hidden_size": 10**12}, "hidden_size"),
    ({"vocab_size": 10**30}, "vocab_size"),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
    ({"num_attention_heads": 10**7}, "attention heads"),
    ({"intermediate_size": 2**63}, "intermediate_size"),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, "attention heads (5)"),
    ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ({"num_key_value_heads": 12}, "num_key_value_heads"),
    ({"head_dim": 7}, "head_dim"),
    ({"num_attention_heads": 5}, "num_key_value_heads (=2)"),
    ({"hidden_act": "silo"}, "hidden_act"),
    ({"hidden_act": 7}, "hidden_act"),
    ({"hidden_act": None}, "hidden_act"),
    ({"dtype": "float33"}, "dtype"),
    ({"dtype": "Tensor"}, "dtype"),
    ({"dtype": "int8"}, "dtype"),
    ({"dtype": 32}, "dtype"),
    ({"pad_token_id": 300}, "pad_token_id"),
    ({"pad_token_id": -301}, "pad_token_id"),
    ({"pad_token_id": "0"}, "pad_token_id"),
    ({"eos_token_id": "end"}, "eos_token_id"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"initializer_range": -0.1}, "initializer_range"),
    ({"attention_dropout": "none"}, "attention_dropout"),
    ({"attention_dropout": 1.5}, "attention_dropout"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"attention_bias": 2}, "attention_bias"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"max_position_embeddings": -1}, "max_position_embeddings"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "factor"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": -2.0}}, "factor"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "factor"),
    ({"rope_parameters": "default"}, "rope_parameters"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": None, "rope_theta": 1e4}}, "rope_type"),
    ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "spiral"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention", "magic"]}, "layer_types"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"_attn_implementation": "kernels-community/flash-attn2"}, "kernels-community"),
    ({"attn_implementation": "kernels-community/flash-attn2"}, "kernels-community"),
    ({"_attn_implementation": "magic"}, "magic"),
    ({"quantization_config": "int4"}, "quantization_config"),
    ({"model_type": "lama"}, "lama"),
    ({"model_type": None}, "model type"),
    ({"model_type": 7}, "model_type"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"model_type": REMOVED}, "model_type"),
    ({"model_type": "bert"}, "bert"),
    ({"model_type": "t5"}, "t5"),
]  # fmt: skip
# that the model's weights do not have; inspect reads none and sizes what the config says
BEYOND = [
    ({"vocab_size": 10**8}, "100000000"),
    ({"intermediate_size": 10**8}, "100000000"),
    ({"head_dim": 10**6}, "2000000"),
    ({"num_key_value_heads": 6}, "k_proj"),
    ({"num_hidden_layers": 1000}, "missing"),
]
OTHERS = {
    "gpt2": [
        ({"n_head": 0}, "n_head"),
        ({"n_head": 5}, "num_heads"),
        ({"n_embd": -48}, "n_embd"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_positions": 0}, "n_positions"),
        ({"activation_function": "gulu"}, "activation_function"),
        ({"n_inner": 0}, ("mlp.c_fc", "does not describe a model")),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon"),
    ],
    "gemma3": [
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": -4}, "sliding_window"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"hidden_activation": "gulu"}, "hidden_activation"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"rope_parameters": {"full_attention": {"rope_type": "spiral", "rope_theta": 1e4}}},
         "rope"),
    ],
    "qwen3_moe": [
        ({"num_local_experts": 0}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"num_local_experts": "four"}, "num_local_experts"),
    ],
}  # fmt: skip
FILES = [
    ("empty", ""),
    ("no JSON", "{not json"),
    ("binary", BINARY),
    ("UTF-16", '{"model_type": "llama"}'.encode("utf-16")),
    ("null", "null"),
    ("a list", "[1, 2]"),
    ("a list of pairs", '[["model_type", "llama"]]'),
    ("a number", "7"),
    ("a string", '"llama"'),
    ("an empty object", "{}"),
    ("deep", DEEP),
    ("a deep field", '{"model_type": "llama", "x": ' + DEEP + "}"),
    ("a number of 5000 digits", '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"),
]
# what stands at "supra" or beside it in the config.json of a converted model
PLANS = [
    ({"supra": None}, "format_version"),
    ({"supra": REMOVED}, "format_version"),
    ({"supra": []}, "supra"),
    ({"supra": "supra"}, "supra"),
    ({"supra": 7}, "supra"),
    ({"supra": {}}, "format_version"),
    ({"supra.format_version": 2}, "format_version"),
    ({"supra.format_version": "1"}, "format_version"),
    ({"supra.format_version": True}, "format_version"),
    ({"supra.layers": REMOVED}, "layers"),
    ({"supra.layers": None}, "layers"),
    ({"supra.layers": []}, "layers"),
    ({"supra.layers": ["supra"]}, "layers"),
    ({"supra.layers": ["supra"] * 3}, "layers"),
    ({"supra.layers": "supra"}, "layers"),
    ({"supra.layers": "su"}, "layers"),
    ({"supra.layers": {"0": "supra", "1": "supra"}}, "layers"),
    ({"supra.layers": ["supra", "supar"]}, "supar"),
    ({"supra.layers": ["supra", None]}, "layers"),
    ({"supra.layers": ["supra", 1]}, "layers"),
    ({"supra.layers": [["supra"], "supra"]}, "layers"),
    ({"supra.options": REMOVED}, "options"),
    ({"supra.options": None}, "options"),
    ({"supra.options": []}, "options"),
    ({"supra.options": {"supra": 7}}, "options"),
    ({"supra.options": {"supra": ["decay"]}}, "options"),
    ({"supra.options": {"mamba2": {}}}, "options"),
    ({"supra.options.supra.decay": "fats"}, "decay"),
    ({"supra.options.supra.decay": ["fixed"]}, "decay"),
    ({"supra.options.supra.scale": "no"}, "scale"),
    ({"supra.options.supra.expansion": 0}, "expansion"),
    ({"supra.options.supra.expansion": 1e9}, "expansion"),
    ({"supra.options.supra.feature_mp": "relu"}, "feature_map"),
    ({"supra.options.supra.7": 7}, "7"),
    ({"num_hidden_layers": 3}, "num_hidden_layers"),
    ({"base_model_type": REMOVED}, "base_model_type"),
    ({"base_model_type": "lama"}, "lama"),
    ({"base_model_type": None}, "base_model_type"),
    ({"base_model_type": ["llama"]}, "base_model_type"),
    ({"base_model_type": "supra"}, "base_model_type"),
    ({"base_model_type": "t5"}, "t5"),
    ({"head_dim": 0}, "head_dim"),
    ({"hidden_act": "silo"}, "hidden_act"),
    ({"pad_token_id": 300}, "pad_token_id"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
    ({"dtype": "float33"}, "dtype"),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
    ({"state_policy": 7}, "state_policy"),
    ({"state_policy": []}, "state_policy"),
    ({"state_policy": "window"}, "state_policy"),
    ({"state_policy": {"windw": 4}}, "windw"),
    ({"state_policy": {"window": 0}}, "window"),
    ({"state_policy": {"window": "four"}}, "window"),
    ({"state_policy": {"window": 10**30}}, "window"),
    ({"state_policy": {"window": 10**6}}, "1 to 131072"),
    ({"supra.options.supra.expansion": 2**20}, "1 to 256"),
    ({"state_policy": {"norm": -1.0}}, "norm"),
    ({"state_policy": {"norm": {}}}, "norm"),
    ({"state_policy": {"norm": [[1.0] * 6]}}, "norm"),
    ({"state_policy": {"norm": [[1.0] * 5] * 2}}, "norm"),
    ({"state_policy": {"decay_scale": 0}}, "decay_scale"),
    ({"state_policy": {"decay_scale": float("nan")}}, "decay_scale"),
    ({"state_policy": {"norm": 1.0, "window": 4}}, "window"),
    ({"state_policy": {"norm_every": 0}}, "norm_every"),
]


def _described(changes: dict) -> str:
    words = [
        f"without {name}" if value is REMOVED else f"{name} {value!r}"
        for name, value in changes.items()
    ]
    return ", ".join(words)


def _source_cases() -> list[Case]:
    """Each field in a conversion, and in one of the other commands, in turn."""
    found, others = [], cycle((INSPECT, EVAL, TEACHER, GENERATE, TASK))
    for shared, rows in {"base": LLAMA, **OTHERS}.items():
        for changes, says in rows:
            for command in (CONVERT, next(others)):
                name = f"{command.split()[0]} {shared}: {_described(changes)}"
                make = copied(shared, fields(changes))
                found.append(refused(command, says, make=make, name=name))
    return found


def _beyond_cases() -> list[Case]:
    return [
        refused(
            command,
            says,
            make=copied("base", fields(changes)),
            name=f"{command.split()[0]} base: weights have other sizes than {_described(changes)}",
        )
        for changes, says in BEYOND
        for command in (CONVERT, EVAL, GENERATE, TEACHER)
    ]


def _file_cases() -> list[Case]:
    commands = cycle((CONVERT, INSPECT, EVAL, GENERATE, STUDENT, TEACHER, DIAGNOSE, SERVE))
    return [
        refused(
            next(commands),
            "config.json",
            make=copied("base", file("config.json", content)),
            name=f"config.json is {name}",
        )
        for name, content in FILES
    ]


def _plan_cases() -> list[Case]:
    commands = cycle((GENERATE, INSPECT, EVAL, DIAGNOSE, STUDENT, TASK))
    return [
        refused(
            command := next(commands),
            says,
            make=copied("rnn", fields(changes)),
            name=f"{command.split()[0]} rnn: {_described(changes)}",
        )
        for changes, says in PLANS
    ]


CASES = [
    *_source_cases(),
    *_beyond_cases(),
    *_file_cases(),
    *_plan_cases(),
    refused(CONVERT, "config.json", make=copied("base", without("config.json")),
            name="no config.json"),
    refused(CONVERT, "converted", make=copied("rnn"), name="a converted model is converted again"),
    refused(CONVERT, "quantised", name="convert base: an unknown quantisation",
            make=copied("base", fields({"quantization_config": {"quant_method": "magic"}}))),
    accepted(EVAL, "transformers says that it does not know it, and the weights are plain",
             make=copied("base", fields({"quantization_config": {"quant_method": "magic"}})),
             name="eval base: an unknown quantisation"),
    accepted(EVAL, "what a later version adds to this format changes nothing",
             make=copied("rnn", fields({"supra.more": 1})), name="eval rnn: supra.more 1"),
    accepted(GENERATE, "a Mistral without a window is a Llama",
             make=copied("rnn", fields({"base_model_type": "mistral"})),
             name="generate rnn: base_model_type 'mistral'"),
    refused(EVAL, "keys in the checkpoint", name="eval rnn: base_model_type 'gpt2'",
            make=copied("rnn", fields({"base_model_type": "gpt2"}))),
    accepted(EVAL, "the class follows from base_model_type",
             make=copied("rnn", fields({"architectures": ["SupraGPT2LMHeadModel"]})),
             name="eval rnn: other architectures"),
    accepted(INSPECT, "tools write it, and a converted model has mixers whatever it says",
             make=copied("rnn", fields({"_attn_implementation": "eager"})),
             name="attention implementation of a converted model"),
    accepted(CONVERT, "the first Llamas have it: no token of theirs is padding",
             make=copied("base", fields({"pad_token_id": -1})), name="a pad token of -1"),
    accepted(CONVERT, "models name end tokens that their tokenizer alone knows",
             make=copied("base", fields({"eos_token_id": 999})), name="an end beyond all tokens"),
    accepted(CONVERT, "fields that a family does not know are kept and change nothing",
             make=copied("base", fields({"colour": {"a": [1]}})), name="a field of no family"),
]  # fmt: skip
