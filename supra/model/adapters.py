"""Tells peft about converted models: where LoRA goes, and which adapters cannot work.

    peft.LoraConfig(task_type="CAUSAL_LM")                             mixers stay as they are
    peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["mixer"])  mixers train in full

Without `target_modules`, every projection of the attention modules gets an adapter. The first form
is for fine-tuning a model that has been uptrained. The second is for uptraining: the adapter's file
then holds the mixers too.
"""

from contextlib import suppress

from supra.errors import UserError

# The names of attention modules in the families, and of the projections in them. The module's name
# is part of each target: some families have a gate_proj, c_proj or Wo in the feed-forward too.
_PROJECTIONS = {
    "self_attn": (
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "g_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        *("qkv_proj", "query_key_value", "dense"),
    ),
    "attn": ("q_proj", "k_proj", "v_proj", "Wo", "c_attn", "c_proj"),
    "attention": ("query_key_value", "dense"),
}
LORA_TARGETS = [f"{parent}.{name}" for parent, names in _PROJECTIONS.items() for name in names]
TRAINED_IN_FULL = ["mixer"]


def refuse_prefix(past_key_values: object) -> None:
    """Raise UserError. peft calls this to hand trained keys and values to the model."""
    raise UserError(
        "a prefix of trained keys and values (peft_type PREFIX_TUNING or CARTRIDGE) needs a "
        "key-value cache, which a recurrent model does not have: use LoRA or prompt tuning"
    )


# Models load without peft, or with one that is too old to import.
with suppress(ImportError):
    from peft.utils import constants

    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["supra"] = LORA_TARGETS
    constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING["supra"] = refuse_prefix
