"""The student and the teacher: loading them, and writing the result."""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.checkpoints import find_checkpoint
from supra.errors import UserError
from supra.mixers import NEW_PARAMETERS
from supra.report import REPORT
from supra.uptrain.config import UptrainConfig
from supra.uptrain.lora import add_lora
from supra.uptrain.optim import freeze_unused


def load_student(config: UptrainConfig) -> PreTrainedModel:
    """The student in float32: bf16 weights would round most of AdamW's updates away."""
    return find_checkpoint(config.student).model(torch.float32)


def make_trainable(model: PreTrainedModel, config: UptrainConfig) -> torch.nn.Module:
    """The student with its adapters, and with a gradient only where there is a learning rate."""
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if config.lora:
        model = add_lora(model, config.lora)
    freeze_unused(model, config.optimizer)
    return model.train()


def load_teacher(config: UptrainConfig) -> PreTrainedModel | None:
    """The teacher, frozen, in the dtype that the student computes in; None without one."""
    if config.teacher is None:
        return None
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    teacher = find_checkpoint(config.teacher).model(dtype).requires_grad_(False).eval()
    own = find_checkpoint(config.student).config().get_text_config().vocab_size
    other = teacher.config.get_text_config().vocab_size
    if own != other:
        raise UserError(
            f"teacher (={config.teacher}) has another vocabulary than the student: "
            f"vocab_size {other}, not {own}"
        )
    return teacher


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
        if NEW_PARAMETERS not in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    for pattern in (REPORT, "LICENSE*", "NOTICE*"):
        for file in student.folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, to / file.name)
