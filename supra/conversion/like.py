"""The config and the tokenizer of an untrained model: those of a model, or of a config file and a
model, with changes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from supra.checkpoint.config_rules import check_config, check_fields
from supra.checkpoint.opening import Checkpoint, find_checkpoint
from supra.checkpoint.untrusted import without_code
from supra.errors import LARGEST, UserError, check_choice, foreign_errors, shown
from supra.model.families import FAMILIES, refusal
from supra.settings.yaml_text import parse_yaml

CONFIG_FILES = (".yaml", ".yml", ".json")
# what a config says of the weights that it was stored with
OF_WEIGHTS = ("quantization_config", "dtype", "torch_dtype", "architectures", "_name_or_path")


@dataclass(frozen=True)
class Like:
    """What a new model is like. `words` are the part of the command that says so; of paths they
    have the last part only."""

    words: list[str]
    config: PreTrainedConfig
    tokenizer: Checkpoint


def read_like(
    like: str, tokenizer: str | None, settings: Mapping[str, Any], revision: str | None
) -> Like:
    """Read the config, change it, and find the tokenizer. No weights are read.

    Args:
        like: a hub id, a folder, a GGUF file, or a config file in YAML or JSON.
        tokenizer: a hub id or folder; None takes the tokenizer of `like`. The vocabulary and its
            special tokens are then this tokenizer's.
        settings: fields of the config that replace those of `like` and of the tokenizer.
        revision: revision of the hub id `like`.

    Raises UserError for a model that does not convert, and for a field that does not exist.
    """
    if like.endswith(CONFIG_FILES):
        if revision is not None:
            raise UserError(f"revision (={revision!r}) is only for models on the hub: leave it out")
        given, donor = _read_config(Path(like).expanduser()), None
        words = ["--like", Path(like).name]
    else:
        donor = find_checkpoint(like, revision)
        given = donor.config().to_dict()
        words = ["--like", donor.public_name]
        words += [] if revision is None else ["--revision", revision]
    if given.get("model_type") not in FAMILIES:
        raise UserError(f"like (={like!r}): {_refusal(given)}")
    if tokenizer is not None:
        donor = _open_tokenizer(tokenizer)
        given |= vocabulary(_tokenizer_of(donor, given))
        words += ["--tokenizer", donor.public_name]
    if donor is None:
        raise UserError(
            f"like (={like!r}) is a config without a tokenizer: give tokenizer, a model or folder "
            "that has one"
        )
    for name, value in settings.items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    return Like(words, _make_config(_changed(given, settings)), donor)


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The fields of a config that depend on its tokenizer."""
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    size = max(tokenizer.get_vocab().values()) + 1
    return {"vocab_size": size} | {name: getattr(tokenizer, name) for name in special}


def _read_config(file: Path) -> dict[str, Any]:
    """The fields of a config file."""
    try:
        text = file.read_bytes()
    except OSError as error:
        raise UserError(f"like (={file.name}) cannot be read: {error.strerror}") from None
    found = parse_yaml(text, f"like (={file.name})")
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise UserError(
            f"like (={file.name}) must be the config of a model in transformers: a mapping with a "
            "model_type, such as llama"
        )
    return found


def _refusal(given: Mapping[str, Any]) -> str:
    kind = given["model_type"]
    if kind == "supra":
        return "it is a converted model: name the model that it was converted from"
    return refusal(kind)


def _open_tokenizer(name: str) -> Checkpoint:
    """A folder with a tokenizer need not have a model."""
    folder = Path(name).expanduser()
    return Checkpoint(name, folder) if folder.is_dir() else find_checkpoint(name)


def _tokenizer_of(donor: Checkpoint, given: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    if donor.gguf_file is not None or (donor.folder / "config.json").is_file():
        return donor.tokenizer()
    # any vocabulary fits, because it decides the size of the model's
    return donor.tokenizer(config=_make_config(given | {"vocab_size": LARGEST}))


def _changed(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields after the changes. Lists with an entry per layer are left to the family if their
    number changes, and heads that shared the width go on to do so."""
    family, kind = CONFIG_MAPPING[given["model_type"]], given["model_type"]
    known = {x.name for x in fields(family)} - {x.name for x in fields(PreTrainedConfig)}
    own_name = family.attribute_map  # from the names that all families share
    for name in settings:
        check_choice(f"field of a {kind} config", name, {*known, *own_name})
    settings = {own_name.get(name, name): x for name, x in settings.items()}
    changed = {**given, **settings}
    depth, width, heads = (
        own_name.get(name, name)
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    layers = given.get(depth)
    for name, value in given.items():
        per_layer = isinstance(value, list) and len(value) == layers and name not in settings
        if per_layer and changed[depth] != layers:
            del changed[name]
    shared = _head_size(given, width, heads)
    if shared and given.get("head_dim") == shared and "head_dim" not in settings:
        changed["head_dim"] = _head_size(changed, width, heads)
    return changed


def _head_size(of: Mapping[str, Any], width: str, heads: str) -> int | None:
    """The size of heads that share the width; None if it is not a number."""
    sizes = of.get(width), of.get(heads)
    return sizes[0] // sizes[1] if all(isinstance(x, int) and x > 0 for x in sizes) else None


def _make_config(given: Mapping[str, Any]) -> PreTrainedConfig:
    given = {name: x for name, x in without_code(dict(given)).items() if name not in OF_WEIGHTS}
    check_fields(given)
    with foreign_errors(f"the config of a {shown(given['model_type'])} cannot be made"):
        config = CONFIG_MAPPING[given["model_type"]].from_dict(given)
    check_config(config)
    return config
