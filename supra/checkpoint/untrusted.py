"""Opens and copies only data of a checkpoint, and only files that lie in its folder.

The author of a checkpoint chose its file names, links and JSON. None of these may lead out of the
folder or make code run.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from supra.errors import UserError, shown

TEMPLATES = "additional_chat_templates"
TOKENIZER_FILES = (
    "tokenizer*.json", "tokenizer*.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab*.json", "vocab*.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
    "chat_template*.json", "chat_template*.jinja", f"{TEMPLATES}/*.jinja",
)  # fmt: skip
LICENSE_FILES = ("LICENSE*", "NOTICE*")
# the files that transformers may open in a checkpoint's folder, and in the folder of a GGUF file
OPENED = ("*.json", "*.safetensors", "*.jinja", *TOKENIZER_FILES)
OPENED_BESIDE_GGUF = ("*config.json", "adapter_model*", *TOKENIZER_FILES)
# config keys that name code, in the checkpoint's repository or in another
CODE_KEYS = ("auto_map", "custom_pipelines")
KERNEL_KEYS = ("attn_implementation", "experts_implementation")


def belongs(file: Path, folder: Path) -> bool:
    """Whether a file lies in a checkpoint's folder after all links are followed.

    In a hub cache, `snapshots/<commit>/<name>` is a link into a folder `blobs`, which belongs to
    this model or to all models. Files there count as the checkpoint's own. The folder itself may be
    a link.
    """
    target, home = (Path(os.path.realpath(path)) for path in (file, folder))
    homes = [home]
    if home.parent.name == "snapshots":
        homes += [place / "blobs" for place in home.parents[1:3]]
    return any(target.is_relative_to(place) for place in homes)


def own_file(folder: Path, name: str, where: str) -> Path:
    """The file of the folder that another of its files, `where`, calls `name`.

    Raises UserError if the name or a link leads out of the folder.
    """
    file = isinstance(name, str) and os.path.normpath(name) != "." and not os.path.isabs(name)
    if not file or not belongs(folder / name, folder):
        raise UserError(
            f"{where} of {folder.name} names {shown(name)}, which is not a file of that folder; "
            "nothing else is read: download the model again, or copy the file there"
        )
    return folder / name


def check_opened(folder: Path, gguf: bool = False) -> None:
    """Raise UserError if transformers would leave the folder, open a pickle or run code.

    gguf: the checkpoint is a GGUF file in the folder, not the folder itself.
    """
    for file in _matching(folder, OPENED_BESIDE_GGUF if gguf else OPENED):
        if not belongs(file, folder):
            raise UserError(
                f"{file.name} in {folder.name} is a link that leads out of the folder, and nothing "
                "outside it is read: replace the link by a copy of the file"
            )
        if not file.exists():
            raise UserError(
                f"{file.name} in {folder.name} is a link to a file that does not exist: download "
                "the model again, or remove the link"
            )
    config = _fields(folder / "config.json")
    if "transformers_weights" in config:
        raise UserError(
            f"config.json of {folder.name} names a file of weights (transformers_weights): rename "
            "it to model.safetensors and remove that field"
        )
    for name, value in _fields_within(config):
        if name.removeprefix("_") in KERNEL_KEYS and "/" in str(value):
            raise UserError(
                f"config.json of {folder.name} asks for the kernel {value!r} ({name}), which is "
                f"code from the hub and is not run: remove {name}"
            )
    for name in _fields(folder / "tokenizer_config.json").get("fast_tokenizer_files") or ():
        own_file(folder, name, "tokenizer_config.json")
    if (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder.name} holds an adapter as pickled weights (adapter_model.bin), which are not "
            "opened: save it as safetensors first"
        )


def copy_data(source: Path, folder: Path, patterns: Iterable[str]) -> list[str]:
    """Copy files of a checkpoint into `folder`, and drop references to code from its configs.

    Returns a line for everything that is left out: code, and links that lead out of the folder.
    """
    left_out = []
    for file in _matching(source, patterns):
        name = file.relative_to(source)
        if not belongs(file, source):
            left_out.append(f"{name} is a link that leads out of {source.name}: not copied")
        elif file.is_file() and file.suffix != ".py":
            (folder / name).parent.mkdir(exist_ok=True)
            try:
                shutil.copyfile(file, folder / name)
            except PermissionError:
                if not any(name.match(pattern) for pattern in LICENSE_FILES):
                    raise
                left_out.append(f"{name} of {source.name} may not be read: not copied")
    return left_out + drop_code(folder)


def drop_code(folder: Path) -> list[str]:
    """Drop references to code from the configs in `folder`, except config.json, which `SupraConfig`
    writes. Returns a line for each config that had some."""
    lines = []
    for file in sorted(folder.glob("*_config.json")):
        fields = _fields(file)
        if fields != (kept := without_code(fields)):
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            lines.append(f"{file.name} named code to run: the copy does not name it")
    return lines


def without_code(fields: Any) -> Any:
    """The fields of a config and of configs inside it, without the keys that name code."""
    if isinstance(fields, list):
        return [without_code(x) for x in fields]
    if not isinstance(fields, dict):
        return fields
    return {name: without_code(x) for name, x in fields.items() if name not in CODE_KEYS}


def _fields_within(config: Any) -> Iterator[tuple[str, Any]]:
    """All fields of a config and of configs inside it."""
    if isinstance(config, dict):
        yield from config.items()
    inner = config.values() if isinstance(config, dict) else config
    for value in inner if isinstance(config, dict | list) else ():
        yield from _fields_within(value)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files of the folder that match a pattern, sorted; includes broken links."""
    found = set()
    for pattern in patterns:
        place = folder / Path(pattern).parent
        if place != folder and not belongs(place, folder):
            found.add(place)
        elif place.is_dir():
            found |= {x for x in place.iterdir() if x.match(pattern)}
    return sorted(found)


def _fields(file: Path) -> dict[str, Any]:
    """The fields of a JSON file; {} if it is missing or damaged, which its reader will report."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
