"""The student: loading it, and writing the result."""

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


def load_student(config: UptrainConfig) -> PreTrainedModel:
    """The student in float32: bf16 weights would round most of AdamW's updates away."""
    return find_checkpoint(config.student).model(torch.float32)


def make_trainable(model: PreTrainedModel, config: UptrainConfig) -> torch.nn.Module:
    """The student in training mode, with its adapters."""
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if config.lora:
        model = add_lora(model, config.lora)
    return model.train()


def export(
    config: UptrainConfig,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    to: Path,
) -> None:
    """Write trained weights as a checkpoint like the student's: same dtype, with its conversion
    report and licence. LoRA is merged into it, and is in the folder `adapter` as well, for use on
    top of the student.

    What conversion added stays float32, because decays and gates lose their differences in bf16.
    What the family keeps in float32 stays float32, too.
    """
    model = make_trainable(load_student(config), config)
    model.load_state_dict(state)
    if config.lora:
        model.active_peft_config.base_model_name_or_path = config.student
        model.save_pretrained(to / "adapter", save_embedding_layers=False)
        model = model.merge_and_unload()
    student = find_checkpoint(config.student)
    dtype = student.config().dtype or torch.float32
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    drop_code(to)
    left_out = copy_data(student.folder, to, (REPORT, *LICENSE_FILES))
    for line in [*left_out, *record_checksums(to)]:
        tqdm.write(line)
