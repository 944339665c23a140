"""Compares the logits of a converted model and of its export, in float32, on the same tokens."""

import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from supra.checkpoint.config_rules import meta_model
from supra.checkpoint.opening import Checkpoint
from supra.checkpoint.weights import FolderReader, check_tensors
from supra.data.packing import start_tokens, text_tokens
from supra.data.text import open_documents
from supra.errors import UserError
from supra.export.lent_weights import logits_of
from supra.export.native import NativeModel

PROMPT, STEPS = 160, 8  # tokens read at once, and tokens read one by one after them
LARGEST = 1e-3  # difference that is an error, relative to the largest logit


@dataclass(frozen=True)
class Difference:
    """The largest differences between two models' logits, relative to the largest logit."""

    prompt: float
    steps: float

    @property
    def largest(self) -> float:
        """The larger of both."""
        return max(self.prompt, self.steps)

    def line(self) -> str:
        """The differences for a terminal."""
        return (
            f"by {self.prompt:.1e} of the largest logit in a prompt of {PROMPT} tokens, and by "
            f"{self.steps:.1e} in {STEPS} tokens decoded after it"
        )


def difference(logits: Tensor, others: Tensor) -> Difference:
    """The differences between the logits [PROMPT + STEPS, V] of two models."""
    apart = (logits - others).abs().amax(-1) / logits.abs().max()
    return Difference(apart[:PROMPT].max().item(), apart[PROMPT:].max().item())


def sample(checkpoint: Checkpoint, text: str | None, text_field: str) -> Tensor:
    """PROMPT + STEPS tokens [1, T] of a text; by default of Python's manual.

    A model without a tokenizer gets random tokens. Raises UserError for a text that is too short.
    """
    count = PROMPT + STEPS
    if not any(checkpoint.folder.glob("tokenizer*")):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(checkpoint.config().vocab_size, (1, count), generator=generator)
    tokenizer = checkpoint.tokenizer()
    if text is None:
        documents = iter(pydoc_data.topics.topics.values())
    else:
        documents = open_documents(text, text_field).epoch(0)
    found = list(start_tokens(tokenizer))
    for document in documents:
        found += text_tokens(tokenizer, document)
        if len(found) >= count:
            return torch.tensor([found[:count]])
    raise UserError(f"--text ({text}) must have at least {count} tokens, has {len(found)}")


def compare(
    checkpoint: Checkpoint, native: NativeModel, folder: Path, tokens: Tensor, rounded: bool
) -> tuple[Difference, Difference | None]:
    """How far the logits of an export in `folder` are from the converted model's: with the tensors
    as they are made, and, if they were rounded for the files, with those of the files.

    Raises UserError if the files do not hold the tensors that the architecture has.
    """
    config = checkpoint.config()
    logits = logits_of(config, checkpoint.tensors(config).load, tokens, STEPS)
    exported = AutoConfig.from_pretrained(folder)
    check_tensors(folder, meta_model(exported))
    stored = difference(logits, logits_of(exported, FolderReader(folder).load, tokens, STEPS))
    if not rounded:
        return stored, None
    loads = {name: load for name, _, load in native.tensors}
    made = logits_of(exported, lambda name: loads[name](), tokens, STEPS)
    return difference(logits, made), stored


def check_difference(found: Difference) -> None:
    """Raise UserError for a difference that rounding does not explain, or that is no number."""
    if not found.largest <= LARGEST:
        raise UserError(
            f"the exported logits differ from the converted model's {found.line()}, and more than "
            f"{LARGEST} is a mistake: report it with config.json and the version of transformers"
        )
