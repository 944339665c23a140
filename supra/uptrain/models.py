"""Loads the student, and writes the trained model."""

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.checkpoint.checksums import record_checksums
from supra.checkpoint.conversion_report import REPORT
from supra.checkpoint.opening import find_checkpoint
from supra.checkpoint.untrusted import LICENSE_FILES, copy_data, drop_code
from supra.uptrain.config import UptrainConfig
from supra.uptrain.lora import add_lora

DTYPE = torch.float32  # of the student: bf16 weights would round away most of AdamW's updates


def load_student(config: UptrainConfig) -> PreTrainedModel:
    """The whole student."""
    return find_checkpoint(config.student).model(DTYPE)


def make_trainable(model: PreTrainedModel, config: UptrainConfig) -> torch.nn.Module:
    """The student in training mode, with LoRA adapters if the config has them."""
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if config.lora:
        model = add_lora(model, config.lora)
    return model.train()


def export(
    config: UptrainConfig,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write trained weights into `folder`, as a checkpoint like the student's: with its dtype,
    conversion report and licence. LoRA is merged into the weights. The subfolder `adapter` also has
    the adapter alone, for use with the student.

    Parameters that conversion added stay float32, because bf16 would make different decays and
    gates equal. Parameters that the family keeps in float32 stay float32, too.
    """
    model = make_trainable(load_student(config), config)
    model.load_state_dict(state)
    if config.lora:
        model.active_peft_config.base_model_name_or_path = config.student
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        model = model.merge_and_unload()
    student = find_checkpoint(config.student)
    dtype = student.config().dtype or torch.float32
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    drop_code(folder)
    left_out = copy_data(student.folder, folder, (REPORT, *LICENSE_FILES))
    for line in [*left_out, *record_checksums(folder)]:
        tqdm.write(line)
