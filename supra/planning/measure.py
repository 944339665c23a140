"""Counts for one stage: what its memory and its work depend on."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from supra.checkpoint.config_rules import meta_model
from supra.errors import UserError
from supra.losses.chunked import language_model
from supra.model.attention import blocks_of
from supra.model.families import no_mixer
from supra.model.state_size import state_bytes
from supra.planning.activations import count_end_to_end, count_layerwise
from supra.planning.compute import Work
from supra.planning.hardware import Hardware
from supra.planning.memory import Sizes
from supra.planning.parameters import (
    converted,
    count,
    inherited,
    kinds_of,
    products,
    total,
    trainable_student,
)
from supra.uptrain.config import UptrainConfig
from supra.uptrain.optim import trainable
from supra.uptrain.stage_settings import LAYERWISE
from supra.uptrain.stages import wrapped_stages

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KEPT_ATTENTION = "softmax"  # the mixer of layers that keep attention


@dataclass(frozen=True)
class Models:
    """The configs of the student, converted or not, and of the teacher of distill."""

    student: PreTrainedConfig
    teacher: PreTrainedConfig | None


@dataclass(frozen=True)
class Measured:
    """Counts for a stage. trained: what the stage trains, by kind; the other parameters that have
    gradients are those that another stage trains, as several processes need."""

    parameters: dict[str, int]
    trained: dict[str, int]
    sizes: Sizes
    work: Work


class Moved(NamedTuple):
    """Parameters of a stage: those that it changes, those with a gradient, and those with a
    gradient in any stage that runs through the wrapper of several processes."""

    stepped: Collection[nn.Parameter]
    trained: Collection[nn.Parameter]
    bucketed: Collection[nn.Parameter]


def measure(models: Models, config: UptrainConfig, stage: str, hardware: Hardware) -> Measured:
    """Counts for a stage of a run on these machines. Without a teacher, its predictions are cached.

    Raises UserError for a mixture of experts, and for orient or align of a student without a
    recurrent layer.
    """
    model = trainable_student(models.student, config)
    kinds = kinds_of(model)
    layerwise = stage in LAYERWISE
    if layerwise and not converted(model):
        raise UserError(no_mixer(models.student.model_type))
    stepped = dict(trainable(model, {stage: config.stages[stage]}))
    bucketed = dict(trainable(model, wrapped_stages(config)))
    moved = Moved(stepped, stepped if hardware.processes == 1 or layerwise else bucketed, bucketed)
    for parameter in kinds:
        parameter.requires_grad_(parameter in moved.trained)
    return Measured(
        parameters=count(kinds, kinds),
        trained=count(stepped, kinds),
        work=_work(models, model, kinds, stage, moved.trained),
        # last, because the model that was counted with has no weights any more
        sizes=_sizes(models, model, kinds, config, stage, moved, hardware.cp_size),
    )


def _sizes(
    models: Models,
    model: nn.Module,
    kinds: dict[nn.Parameter, str],
    config: UptrainConfig,
    stage: str,
    moved: Moved,
    cp_size: int,
) -> Sizes:
    student = language_model(model)
    blocks = [list(layer.parameters()) for layer in blocks_of(student)]
    head = student.get_output_embeddings().weight
    inner = models.student.get_text_config()
    layerwise, trained = stage in LAYERWISE, moved.trained
    taught = stage == "distill" and models.teacher is not None
    teacher = meta_model(models.teacher) if taught else nn.ModuleList()
    theirs = sum(total(x.parameters()) for x in blocks_of(teacher)) if taught else 0
    softmax = attention_layers(models.student)[1]
    used = (x for block in blocks for x in block if kinds[x] != "frozen copies")
    sizes = {
        "all": total(model.parameters()),
        "blocks": sum(map(total, blocks)),
        "block": max(map(total, blocks)),
        "stepped": total(moved.stepped),
        "trained": total(trained),
        "trained_block": max(total(x for x in block if x in trained) for block in blocks),
        "trained_head": head.numel() if head in trained else 0,
        "frozen_products": total(x for x in used if x.ndim > 1 and x not in trained),
        "bucketed": total(moved.bucketed),
        "head": head.numel(),
        "vocabulary": inner.vocab_size,
        "heads": inner.num_attention_heads,
        "copied": total(x for y in converted(model) for x in inherited(y)) if layerwise else 0,
        "softmax_layers": softmax,
        "key_values": softmax * key_value_channels(models.student),
        "teacher": total(teacher.parameters()),
        "teacher_blocks": theirs,
    }
    _, length = config.of_stage(stage, "sequence_length")
    length = math.ceil(length / cp_size)
    dtype = DTYPES[config.precision]
    if layerwise:
        return Sizes(**sizes, kept=count_layerwise(model, length, dtype, stage == "orient"))
    return Sizes(**sizes, kept=count_end_to_end(model, length, dtype))


def _work(
    models: Models,
    model: nn.Module,
    kinds: dict[nn.Parameter, str],
    stage: str,
    trained: Collection[nn.Parameter],
) -> Work:
    layers, kept = attention_layers(models.student)
    width = channels(models.student)
    teacher, teacher_softmax = _teacher_work(models, model, kinds, stage)
    attention = (x for module in converted(model) for x in module.parameters())
    return Work(
        products=products(kinds, model, kinds),
        blocks=_block_products(model, kinds),
        trained=products(trained, model, kinds),
        state=state_numbers(models.student),
        softmax=kept * width,
        teacher=teacher,
        teacher_softmax=teacher_softmax,
        attention=products(attention, model, kinds),
        matrices=(layers - kept) * width // 2 if stage == "orient" else 0,
    )


def _teacher_work(
    models: Models, model: nn.Module, kinds: dict[nn.Parameter, str], stage: str
) -> tuple[int, int]:
    """What a token goes through in the teacher: products, and channels of softmax attention.

    The teacher of orient and align is the student's blocks with their inherited attention."""
    if stage in LAYERWISE:
        new = products((x for x in kinds if kinds[x] == "mixers"), model, kinds)
        layers, _ = attention_layers(models.student)
        return _block_products(model, kinds) - new, layers * channels(models.student)
    if stage != "distill" or models.teacher is None:
        return 0, 0
    teacher = meta_model(models.teacher)
    inside = kinds_of(teacher)
    layers, _ = attention_layers(models.teacher)
    return products(inside, teacher, inside), layers * channels(models.teacher)


def _block_products(model: nn.Module, kinds: dict[nn.Parameter, str]) -> int:
    inside = (x for layer in blocks_of(language_model(model)) for x in layer.parameters())
    return products(inside, model, kinds)


def state_numbers(config: PreTrainedConfig) -> int:
    """The numbers in the recurrent states of one sequence; 0 for a transformer."""
    layers, kept = attention_layers(config)
    return state_bytes(config, 1, torch.float32) // 4 if kept < layers else 0


def attention_layers(config: PreTrainedConfig) -> tuple[int, int]:
    """The number of layers, and of those with softmax attention."""
    layers = config.get_text_config().num_hidden_layers
    plan = getattr(config, "supra", None)
    return layers, plan["layers"].count(KEPT_ATTENTION) if plan else layers


def channels(config: PreTrainedConfig) -> int:
    """Channels of a layer's queries and values, over all heads."""
    config = config.get_text_config()
    return 2 * config.num_attention_heads * _head_size(config)


def key_value_channels(config: PreTrainedConfig) -> int:
    """Channels of a layer's keys and values, over their own heads."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * heads * _head_size(config)


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
