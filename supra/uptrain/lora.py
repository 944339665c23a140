"""LoRA on the pretrained projections. Parameters that conversion added are trained in full."""

import importlib.util

from transformers import PreTrainedModel

from supra.errors import UserError
from supra.model.adapters import LORA_TARGETS, TRAINED_IN_FULL
from supra.uptrain.config import LoraConfig


def add_lora(model: PreTrainedModel, config: LoraConfig):
    """Wrap `model`: its weights are frozen; adapters and new parameters are trained."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("lora needs the package peft: pip install peft, or set lora=null")
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or LORA_TARGETS,
        modules_to_save=TRAINED_IN_FULL,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"lora.targets (={', '.join(config.targets)}): {error}") from error
