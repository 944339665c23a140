"""Finds and opens a checkpoint: a local folder, a GGUF file, or a hub id."""

import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from supra.checkpoint.config_rules import (
    CONFIG,
    check_config,
    check_fields,
    check_generation_config,
    meta_model,
    padding_errors,
)
from supra.checkpoint.files import fingerprint
from supra.checkpoint.gguf_file import GgufFile
from supra.checkpoint.json_files import read_fields
from supra.checkpoint.placement import Placement
from supra.checkpoint.untrusted import TOKENIZER_FILES, check_opened
from supra.checkpoint.weights import (
    FolderReader,
    ModuleReader,
    check_complete,
    check_safetensors,
    check_tensors,
    model_names,
)
from supra.errors import UserError, check_choice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]
# copies of the same weights in other formats, which some repositories also hold
OTHER_FILES = ["consolidated*", "*/*"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk. The weights of a hub id are downloaded when they are needed.

    `name` is what the user typed. placement: of the weights of `model()`; None for the memory of
    the CPU.
    """

    name: str
    folder: Path
    gguf_file: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    placement: Placement | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments for every `from_pretrained` that opens it. The checkpoint's code never
        runs, and no prompt offers to run it."""
        arguments = {
            "pretrained_model_name_or_path": str(self.folder),
            "trust_remote_code": False,
        }
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        return arguments

    @property
    def public_name(self) -> str:
        """The hub id, or the last part of a local path: the model card, which may be published,
        shows this name."""
        return self.hub_id or Path(os.path.abspath(self.name)).name

    def fingerprint(self) -> str:
        """A fingerprint of config and weights: sizes and samples of local files, or the commit of a
        hub id, so that nothing is downloaded."""
        if self.hub_id is not None:
            return f"{self.hub_id}@{self.folder.name}"  # a snapshot's folder is named by its commit
        names = [self.gguf_file] if self.gguf_file else ["config.json", "*.safetensors"]
        return fingerprint(self._files(names))

    def tokenizer_fingerprint(self) -> str:
        """A fingerprint of the tokenizer's files; for a GGUF file, of the whole file."""
        if self.hub_id is not None or self.gguf_file is not None:
            return self.fingerprint()
        return fingerprint(self._files(TOKENIZER_FILES))

    def _files(self, patterns: Iterable[str]) -> list[Path]:
        return sorted({file for name in patterns for file in self.folder.glob(name)})

    def fetch_weights(self) -> None:
        """Download what find_checkpoint left on the hub."""
        if self.hub_id is not None:
            _download(self.hub_id, self.revision, ["*.safetensors"])

    def check_weights(self) -> None:
        """Raise UserError unless the weights are safetensors or a GGUF file."""
        self.fetch_weights()
        if self.gguf_file is None:
            check_safetensors(self.folder)

    def config(self) -> PreTrainedConfig:
        """The config. Raises UserError for values that make no sense: see `config_rules`."""
        return self._small(AutoConfig.from_pretrained)

    def tokenizer(self, config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises UserError if it has words that the model has no embeddings for.

        config: the model's config, if the folder has none yet.
        """
        given = {} if config is None else {"config": config}
        tokenizer = self._small(AutoTokenizer.from_pretrained, **given)
        with self.named():
            _check_vocabulary(tokenizer, config or self.config())
        return tokenizer

    def model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The whole language model, in `dtype` or in its own; blocks of a GGUF file are unpacked.

        Raises UserError when a tensor is missing, unexpected or of another shape, or when the
        weights are not safetensors.
        """
        self.check_weights()
        config = self.config()
        with self.named():
            check_generation_config(self.folder)
            if self.gguf_file is None and getattr(config, "quantization_config", None) is None:
                check_tensors(self.folder, meta_model(copy.deepcopy(config)))
        arguments = self.arguments | {
            "config": config,
            "ignore_mismatched_sizes": True,  # the loading info then lists them by name
        }
        if self.gguf_file is None:
            arguments["use_safetensors"] = True
        if dtype is not None:
            arguments["dtype"] = dtype
        if self.gguf_file is not None:
            from transformers import GgufConfig

            # packed blocks cannot be saved or trained
            arguments["quantization_config"] = GgufConfig(dequantize=True)
        opener = partial(
            _opened,
            self,
            AutoModelForCausalLM.from_pretrained,
            output_loading_info=True,
            **arguments,
        )
        model, info = opener() if self.placement is None else self.placement.open(opener)
        if self.gguf_file is not None:
            self._gguf.forget()
        with self.named():
            check_complete(info)
        return model

    def tensors(self, config: PreTrainedConfig) -> FolderReader | ModuleReader:
        """A reader that gives each tensor the name it has in the model.

        Files may use older names, as GPT-NeoX's head does. When transformers fuses several stored
        tensors into one parameter, the whole model is loaded into memory instead.
        """
        if self.gguf_file is not None:
            return ModuleReader(self.model())
        self.fetch_weights()
        reader = FolderReader(self.folder)
        names, fused = model_names(meta_model(config), reader.specs)
        if fused:
            return ModuleReader(self.model())
        reader.rename(names)
        return reader

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors raised inside name the checkpoint."""
        try:
            yield
        except UserError as error:
            raise UserError(f"model {self.name!r}: {error}") from error

    @cached_property
    def _gguf(self) -> GgufFile:
        return GgufFile(self.folder / self.gguf_file)

    def _small(self, opener: Callable[..., Any], **given: Any) -> Any:
        """The config or tokenizer that `opener` returns for the checkpoint."""
        read = partial(_opened, self, opener, **self.arguments, **given)
        return read() if self.gguf_file is None else self._gguf.kept(opener, read)


def find_checkpoint(
    name: str,
    revision: str | None = None,
    files: list[str] = SMALL_FILES,
    placement: Placement | None = None,
) -> Checkpoint:
    """The checkpoint that `name` refers to. Raises UserError if it does not exist.

    files: patterns of the files to download now, if `name` is a hub id.
    placement: where the weights of the model are to lie.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model {name!r}: there is no such file")
        _check_no_revision(name, revision)
        return Checkpoint(name, path.parent, path.name, placement=placement)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"model {name!r}: the folder has no config.json: name the folder of a checkpoint"
            )
        _check_no_revision(name, revision)
        return Checkpoint(name, path, placement=placement)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"model {name!r}: there is no such folder")
    folder = _download(name, revision, files)
    return Checkpoint(name, folder, hub_id=name, revision=revision, placement=placement)


def _check_no_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise UserError(
            f"revision (={revision!r}) is only for models on the hub, and {name!r} is local: "
            "leave it out"
        )


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raise UserError if the model has no embedding for a word of the vocabulary.

    Added tokens are not checked: Gemma 3 has one for images, which its text model does not know."""
    added = tokenizer.get_added_vocab()
    largest = max((n for word, n in tokenizer.get_vocab().items() if word not in added), default=0)
    size = config.get_text_config(decoder=True).vocab_size
    if largest >= size:
        raise UserError(
            f"the tokenizer has words up to number {largest}, and the model's vocab_size is "
            f"{size}: use the tokenizer that the model was trained with"
        )


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of that name; None stays None."""
    if name is None:
        return None
    check_choice("dtype", name, DTYPES)
    return DTYPES[name]


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_FILES
        )
        return Path(folder)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"model {name!r} is not a local folder and cannot be fetched from the hub: {reason}"
        ) from error


def _opened(checkpoint: Checkpoint, opener: Any, **arguments: Any) -> Any:
    try:
        with checkpoint.named():
            return _opened_whole(checkpoint, opener, **arguments)
    except UserError:
        raise
    except Exception as error:  # transformers raises a dozen kinds for a broken checkpoint
        logging.getLogger(__name__).debug("opening %s failed", checkpoint.name, exc_info=True)
        if "trust_remote_code" in str(error):
            raise UserError(_without_code(checkpoint, opener)) from error
        if "offload_folder" in str(error):
            raise UserError(
                f"model {checkpoint.name!r}: some weights that are to lie on the disk have another "
                "form in the model's files: give --offload-folder, to write them there"
            ) from error
        reason = " ".join(str(error).split())[:300]
        what = "the tokenizer of " if opener == AutoTokenizer.from_pretrained else ""
        raise UserError(f"{what}model {checkpoint.name!r} does not load: {reason}") from error


def _opened_whole(checkpoint: Checkpoint, opener: Any, **arguments: Any) -> Any:
    """Call the opener, and make the checks of a config that transformers leaves out."""
    gguf = checkpoint.gguf_file is not None
    check_opened(checkpoint.folder, gguf=gguf)
    # a config that is passed in has been checked; a folder that is being written may have none yet
    if not gguf and "config" not in arguments:
        check_fields(read_fields(checkpoint.folder / CONFIG))
    parsed = checkpoint._gguf.parsed() if gguf else nullcontext()
    with parsed, padding_errors(arguments.get("config")):
        found = opener(**arguments)
    if isinstance(found, PreTrainedConfig):
        check_config(found)
    return found


def _without_code(checkpoint: Checkpoint, opener: Any) -> str:
    """The message for a checkpoint that transformers can load only by running its code."""
    if opener == AutoTokenizer.from_pretrained:
        return (
            f"the tokenizer of {checkpoint.name!r} needs code of the checkpoint, which supra does "
            "not run: if the folder has a tokenizer.json, remove auto_map and tokenizer_class from "
            "tokenizer_config.json in a copy of the folder"
        )
    return (
        f"model {checkpoint.name!r} needs code of the checkpoint, which supra does not run: use a "
        "model of a family that is part of transformers (docs/families.md)"
    )
