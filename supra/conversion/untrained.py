"""Make an untrained model of any family that converts, with any mixers.

    supra init --like <hub id, folder or config file> --mixer h3 --keep-attention 1,7 --out ./h3

No weights are read. Weights of the family are drawn as the family draws them, and do not depend on
the mixers: with one seed, models with different mixers start from the same ones.
"""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from supra.checkpoint.card import write_untrained_card
from supra.checkpoint.config_rules import making_model, meta_model
from supra.checkpoint.conversion_report import ConversionReport, TensorFate
from supra.checkpoint.files import check_space, check_vacant, staged_folder
from supra.checkpoint.untrusted import TOKENIZER_FILES
from supra.checkpoint.weights import ModuleReader
from supra.conversion.convert import (
    carried_bytes,
    check_seed,
    copy_tokenizer,
    mixer_words,
    write_tensors,
)
from supra.conversion.layer_choice import evenly_spaced, read_share
from supra.conversion.like import read_like
from supra.conversion.plan import Plan, plan_conversion, plan_layers, short_name
from supra.errors import UserError
from supra.mixers import DEFAULT_MIXER, MIXERS, resolve_mixer
from supra.model.auto import converted_config
from supra.model.remote_code import write_shim


def init(
    like: str | Path,
    out: str | Path,
    *,
    mixer: str | None = None,
    options: dict[str, Any] | None = None,
    keep_attention: Iterable[int] | float = (),
    settings: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    revision: str | None = None,
    progress: bool = False,
) -> ConversionReport:
    """Write an untrained model into the folder `out`, to be trained by `supra uptrain`.

    Args:
        like: what the model is like: a hub id, a folder, a GGUF file, or the config of a model of
            transformers as a YAML or JSON file.
        out: the new folder; it must be missing or empty.
        mixer: a name in MIXERS or PRESETS, for all layers except those in `keep_attention`. None is
            DEFAULT_MIXER; "softmax" makes the transformer itself.
        options: options of that mixer. The others are as published for models that are trained
            from scratch, where that differs from the defaults: see `untrained_options`.
        keep_attention: indices of the layers with softmax attention; −1 is the last layer. A float
            is a share of the layers, evenly spaced.
        settings: fields of the config that differ, such as {"num_hidden_layers": 4}. Fields that
            the family derives from them are derived anew.
        tokenizer: the model or folder whose tokenizer the model gets; None: that of `like`.
        dtype: dtype of the weights. Parameters of mixers are float32.
        seed: seed of all random weights.
        revision: revision of the hub id `like`.
        progress: show a progress bar.

    Raises UserError for a user's mistake, and then leaves no folder behind.
    """
    out = Path(out).expanduser()
    mixer, options = untrained_options(DEFAULT_MIXER if mixer is None else mixer, options)
    check_vacant(out)
    check_seed(seed)
    tokenizer = None if tokenizer is None else str(tokenizer)
    model = read_like(str(like), tokenizer, settings or {}, revision)
    layers = _layers(model.config, mixer, keep_attention)
    chosen = {mixer: options}
    student = meta_model(converted_config(model.config, layers, chosen))
    check_space(out, sum(x.numel() * dtype.itemsize for x in student.parameters()))
    plan = untrained_plan(model.config, layers, chosen, dtype, seed)
    words = ["supra", "init", *model.words, "--out", f"./{out.name}"]
    words += mixer_words(mixer, options, [n for n, x in enumerate(layers) if x != mixer])
    report = ConversionReport(
        teacher="",
        family=model.config.model_type,
        layers=layers,
        options={name: chosen[name] for name in dict.fromkeys(layers) if name in chosen},
        command=shlex.join([*words, "--dtype", short_name(dtype), "--seed", str(seed)]),
        tensors=[_new(fate) for fate in plan.fates if fate.fate != "dropped"],
    )
    with staged_folder(out) as staging:
        copy_tokenizer(model.tokenizer, model.config, staging, TOKENIZER_FILES)
        write_tensors(staging, plan, report, seed, "init" if progress else None)
        report.write(staging)
        write_shim(staging)
        write_untrained_card(staging, report, carried_bytes(plan.student, dtype))
        plan.config.save_pretrained(staging)  # last, because a folder without it does not load
    return report


def untrained_options(
    mixer: str, options: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """The mixer's name and all its options in an untrained model: those of the user, then those
    with which the layer was published, then the defaults.

    The defaults bring a converted model near its teacher. A model that is trained from scratch has
    none, and `Mixer.from_scratch` names the options that its layers were published with.
    """
    name, _ = resolve_mixer(mixer, dict(options or {}))
    return resolve_mixer(mixer, {**MIXERS[name].from_scratch, **(options or {})})


def untrained_plan(
    config: PreTrainedConfig,
    layers: list[str],
    options: dict[str, dict[str, Any]],
    dtype: torch.dtype | None,
    seed: int,
) -> Plan:
    """The plan whose inherited tensors are those of a fresh transformer of the family. Raises
    UserError as `plan_conversion` does."""
    with torch.random.fork_rng(devices=[]), making_model(config):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return plan_conversion(ModuleReader(model), config, layers, options, dtype)


def _layers(
    config: PreTrainedConfig, mixer: str, keep_attention: Iterable[int] | float
) -> list[str]:
    """The mixer of each layer."""
    if isinstance(keep_attention, str):
        raise UserError(
            f"keep_attention (={keep_attention!r}) measures what conversion costs, and nothing is "
            "converted here: give numbers of layers, or a share such as 0.25"
        )
    share, _ = read_share(keep_attention, None)
    count = config.num_hidden_layers
    kept = keep_attention if share is None else evenly_spaced(count, share)
    return plan_layers(count, mixer, kept)


def _new(fate: TensorFate) -> TensorFate:
    """The fate of a random tensor."""
    return replace(fate, fate="new", note="")
