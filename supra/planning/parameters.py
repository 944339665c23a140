"""The student's parameters by kind, and which of them a stage trains."""

import copy
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig

from supra.checkpoint.config_rules import meta_model
from supra.losses.chunked import language_model
from supra.mixers import NEW_PARAMETERS
from supra.model.attention import attention_modules
from supra.uptrain.config import UptrainConfig
from supra.uptrain.models import make_trainable

KINDS = (
    "embeddings", "attention", "mixers", "feed-forward", "norms and biases", "head", "adapters",
    "frozen copies",
)  # fmt: skip


def trainable_student(student: PreTrainedConfig, config: UptrainConfig) -> nn.Module:
    """The student of a run on the meta device: in float32, with the adapters of the config."""
    student = copy.deepcopy(student)
    student.dtype = torch.float32
    # what is computed again would hide what is kept
    plain = config.model_copy(update={"gradient_checkpointing": False})
    model = meta_model(student)
    with torch.device("meta"):
        return make_trainable(model, plain)


def kinds_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """The kind of each parameter. A head that is tied to the embeddings is not one of its own."""
    student = language_model(model)
    special = {
        student.get_output_embeddings(): "head",
        student.get_input_embeddings(): "embeddings",
    }
    inside = {
        parameter: kind
        for module, kind in special.items()
        if module is not None
        for parameter in module.parameters()
    }
    for attention in attention_modules(student):
        inside |= dict.fromkeys(attention.parameters(), "attention")
    return {x: _kind(name, x, inside.get(x)) for name, x in model.named_parameters()}


def _kind(name: str, parameter: nn.Parameter, place: str | None) -> str:
    if ".original_module." in name:  # peft trains a copy of what it trains in full
        return "frozen copies"
    if NEW_PARAMETERS in name:
        return "mixers"
    if "lora_" in name:
        return "adapters"
    if place is not None and (parameter.ndim > 1 or place == "head"):
        return place
    return "feed-forward" if parameter.ndim > 1 else "norms and biases"


def count(parameters: Iterable[nn.Parameter], kinds: dict[nn.Parameter, str]) -> dict[str, int]:
    """The numbers in these parameters, by kind."""
    found: Counter[str] = Counter()
    for parameter in parameters:
        found[kinds[parameter]] += parameter.numel()
    return {kind: found[kind] for kind in KINDS if found[kind]}


def products(
    parameters: Iterable[nn.Parameter], model: nn.Module, kinds: dict[nn.Parameter, str]
) -> int:
    """The numbers in the matrices that every token is multiplied with.

    Frozen copies are not used, and an embedding is only looked up, unless it is the head as well.
    """
    head = language_model(model).get_output_embeddings().weight
    used = (x for x in parameters if kinds[x] not in ("embeddings", "frozen copies") or x is head)
    return sum(x.numel() for x in used if x.ndim > 1)


def total(parameters: Iterable[nn.Parameter]) -> int:
    """The numbers in them."""
    return sum(x.numel() for x in parameters)


def converted(model: nn.Module) -> list[nn.Module]:
    """The attention modules that have a recurrent mixer."""
    return [x for x in attention_modules(model) if hasattr(x, "mixer") and x.mixer.recurrent]


def inherited(attention: nn.Module) -> list[nn.Parameter]:
    """The parameters of an attention module that are the teacher's."""
    return [x for name, x in attention.named_parameters() if NEW_PARAMETERS not in f".{name}"]
