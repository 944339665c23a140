"""What is planned: the settings of a run, and the configs of its models. No weights are read."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from supra.checkpoint.config_rules import CONFIG
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.layer_choice import evenly_spaced, read_share
from supra.conversion.plan import check_family, plan_layers
from supra.errors import UserError
from supra.mixers import resolve_mixer
from supra.model.auto import converted_config
from supra.planning.measure import Models
from supra.uptrain import tree
from supra.uptrain.config import UptrainConfig
from supra.uptrain.shipped import find_recipe

PLACEHOLDER = "planned"  # for settings that a run needs and a plan does not


class Conversion(NamedTuple):
    """A conversion to come; the arguments are those of `supra.conversion.convert.convert`."""

    model: str
    mixer: str
    options: dict[str, Any]
    keep_attention: Iterable[int] | float | str = ()


def read_settings(
    path: str | Path, overrides: Sequence[str], conversion: Conversion | None
) -> UptrainConfig:
    """The settings of a run; `out` and the text need not be among them.

    conversion: gives the student, and the teacher where distill has none. Raises UserError.
    """
    values = tree.given(find_recipe(path), overrides)
    if conversion is not None:
        if any(override.startswith("student=") for override in overrides):
            raise UserError(
                f"student= and --model (={conversion.model}) are both given: a plan is of a "
                "converted model or of a conversion; keep one"
            )
        values["student"] = conversion.model
        if values.get("distill") is not None:
            values.setdefault("teacher", conversion.model)
    elif "student" not in values:
        raise UserError(
            "student is missing: set student=FOLDER to a converted model, or plan its conversion "
            "with --model"
        )
    data = values.setdefault("data", {})
    values.setdefault("out", PLACEHOLDER)
    if isinstance(data, dict) and not data.get("sources"):
        data.setdefault("path", PLACEHOLDER)
    return tree.build(values)


def find_models(
    config: UptrainConfig, conversion: Conversion | None, filled_cache: bool = False
) -> Models:
    """The configs of student and teacher; of a hub id, config.json alone is downloaded.

    filled_cache: distill.cache has the predictions for all rows, so no teacher is loaded.
    Raises UserError for a model that does not exist or does not convert, and for a teacher with
    another vocabulary.
    """
    student = read_config(config.student)
    if conversion is not None:
        student = convert_config(student, conversion)
    if filled_cache and (config.distill is None or config.distill.cache is None):
        raise UserError(
            "--filled-cache is about distill.cache, which is not set: set distill.cache=FOLDER and "
            "distill.top_k, or leave --filled-cache out"
        )
    if config.distill is None or filled_cache:
        return Models(student, None)
    teacher = read_config(config.teacher)
    own, other = (x.get_text_config().vocab_size for x in (student, teacher))
    if own != other:
        raise UserError(
            f"teacher (={config.teacher}) has vocab_size {other} and the student has {own}: "
            "give the model that the student was converted from"
        )
    return Models(student, teacher)


def read_config(name: str) -> PreTrainedConfig:
    """The config of a folder, a GGUF file or a hub id."""
    return find_checkpoint(name, files=[CONFIG]).config()


def convert_config(base: PreTrainedConfig, conversion: Conversion) -> PreTrainedConfig:
    """The config that a conversion will write."""
    check_family(base)
    mixer, options = resolve_mixer(conversion.mixer, conversion.options)
    kept, count = conversion.keep_attention, base.num_hidden_layers
    # which layers are kept makes no difference here, so a share needs no text to choose them by
    share, _ = read_share(kept, "" if isinstance(kept, str) else None)
    layers = plan_layers(count, mixer, kept if share is None else evenly_spaced(count, share))
    return converted_config(base, layers, {mixer: options})
