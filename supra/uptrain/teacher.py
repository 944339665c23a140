"""The teacher's predictions for a batch: computed, or read from the cache of an earlier run."""

import hashlib
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from supra.checkpoint.files import disk_errors, follow_umask, held
from supra.checkpoint.opening import find_checkpoint
from supra.data.packing import Block
from supra.errors import UserError
from supra.losses.chunked import chunks, hidden_states, logits_of
from supra.losses.token_losses import TopK
from supra.model.attention import blocks_of
from supra.uptrain.compiled import compile_all
from supra.uptrain.config import UptrainConfig
from supra.uptrain.spread import is_sharded, load, shard_blocks

Targets = Callable[[slice | Tensor], Tensor | TopK]
"""Rows of the flattened batch, a slice or their numbers -> the teacher's logits [n, V] for them, or
its most likely tokens."""


class Teacher:
    """The model is only loaded when a batch is not in the cache."""

    def __init__(self, config: UptrainConfig, accelerator: Accelerator):
        self.name, self.accelerator, self.settings = config.teacher, accelerator, config.distill
        self.device, self.compiles = accelerator.device, config.compile
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        own, other = (
            find_checkpoint(name).config().get_text_config().vocab_size
            for name in (config.student, config.teacher)
        )
        self.vocabulary = own
        if own != other:
            raise UserError(
                f"teacher (={config.teacher}) has vocab_size {other} and the student has {own}: "
                "give the model that the student was converted from"
            )
        top_k = config.distill.top_k
        if top_k is not None and top_k > own:
            raise UserError(
                f"distill.top_k (={top_k}) is more than the vocabulary's {own} tokens: lower it, "
                "or leave it out to use all tokens"
            )

    @cached_property
    def model(self) -> PreTrainedModel:
        """Frozen, in the dtype that the student computes in. Under FSDP all processes must ask for
        it together, and each has a part."""
        model = load(self.accelerator, find_checkpoint(self.name), self.dtype)
        model.requires_grad_(False).eval()
        if is_sharded(self.accelerator):
            shard_blocks(self.accelerator, model)
        if self.compiles:
            compile_all(blocks_of(model))
        return model

    def forget(self) -> None:
        """Free the model; it is loaded again when it is needed."""
        self.__dict__.pop("model", None)

    @cached_property
    def _identity(self) -> str:
        return find_checkpoint(self.name).fingerprint()

    @torch.no_grad()
    def targets(self, batch: Block) -> Targets:
        """The targets for a batch [B, T] on the teacher's device."""
        if self.settings.top_k is not None:
            return self._top_k(batch).rows
        hidden = self._hidden(batch)
        return lambda rows: logits_of(self.model, hidden[rows])

    def _hidden(self, batch: Block) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        return hidden_states(self.model, **inputs)

    def _top_k(self, batch: Block) -> TopK:
        if self.settings.cache is None:
            return self._computed_top_k(batch)
        files = list(map(self._file, batch["input_ids"], batch["position_ids"]))
        kept = [self._read(file, batch["input_ids"].shape[1]) for file in files]
        if self._runs(None in kept):
            found = self._computed_top_k(batch)
            length = batch["input_ids"].shape[1]
            for index, file in enumerate(files):
                if kept[index] is None:
                    kept[index] = found.rows(slice(index * length, (index + 1) * length))
                    _write(file, kept[index])
        return TopK(
            torch.cat([block.tokens for block in kept]),
            torch.cat([block.log_probabilities for block in kept]),
        )

    def _runs(self, missing: bool) -> bool:
        """Whether the model runs: if rows are missing, under FSDP also those of other processes."""
        return any(gather_object([missing])) if is_sharded(self.accelerator) else missing

    def _read(self, file: Path, length: int) -> TopK | None:
        """A row of `length` tokens from the cache; None if it is missing or damaged."""
        if not file.exists():
            return None
        try:
            tensors = load_file(file, device=str(self.device))
            block = TopK(tensors["tokens"].long(), tensors["log_probabilities"])
            valid = self._is_valid(block, length)
        except (SafetensorError, OSError, KeyError):
            valid = False
        if not valid:
            tqdm.write(f"supra: {file} is damaged: the teacher runs again", file=sys.stderr)
        return block if valid else None

    def _is_valid(self, block: TopK, length: int) -> bool:
        tokens, log_p = block.tokens, block.log_probabilities
        shape = (length, self.settings.top_k)
        return (
            tokens.shape == log_p.shape == shape
            and log_p.dtype == torch.float16
            and bool(((tokens >= 0) & (tokens < self.vocabulary)).all())
            and bool((log_p <= 0).all())  # false for NaN
        )

    def _computed_top_k(self, batch: Block) -> TopK:
        hidden, settings = self._hidden(batch), self.settings
        found = [
            TopK.of(logits_of(self.model, hidden[rows]), settings.top_k, settings.temperature)
            for rows in chunks(self.model, hidden)
        ]
        return TopK(
            torch.cat([part.tokens for part in found]),
            torch.cat([part.log_probabilities for part in found]),
        )

    def _file(self, input_ids: Tensor, position_ids: Tensor) -> Path:
        """The file of a row, named by a hash of everything that its numbers depend on."""
        settings = self.settings
        key = hashlib.sha256(
            f"{self._identity} {self.dtype} {settings.top_k} {settings.temperature}".encode()
        )
        for column in (input_ids, position_ids):
            key.update(column.cpu().numpy().tobytes())
        name = key.hexdigest()
        return Path(settings.cache).expanduser() / name[:2] / f"{name[2:]}.safetensors"


def _write(file: Path, block: TopK) -> None:
    """Write a block, completely or not at all. Does nothing if another process is writing it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    tensors = {
        "tokens": block.tokens.int().contiguous(),
        "log_probabilities": block.log_probabilities.contiguous(),
    }
    partial.touch()
    with suppress(UserError), held(partial, file):
        with disk_errors():
            save_file(tensors, partial)
            follow_umask(partial)
        partial.replace(file)
