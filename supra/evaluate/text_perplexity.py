"""`supra eval text`: perplexity of one model on one text."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from supra.checkpoint.loading import load_model
from supra.checkpoint.opening import Checkpoint
from supra.data.blocks import blocks_from_text
from supra.data.text import open_documents
from supra.errors import UserError
from supra.evaluate.perplexity import perplexity
from supra.model.positions import check_positions


@dataclass(frozen=True)
class TextResult:
    """Perplexity is exp of the mean loss in nats per predicted token."""

    model: str
    text: str
    sequence_length: int
    tokens: int
    loss: float
    perplexity: float
    by_position: list[tuple[int, int, float]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        lines = [
            f"{self.model} on {self.text}: perplexity {self.perplexity:.3f} "
            f"({self.loss:.4f} nats a token, {self.tokens:,} tokens)"
        ]
        for start, end, value in self.by_position:
            lines.append(
                f"  after {start:>6,} to {end - 1:>6,} tokens of the document: {value:.3f}"
            )
        return lines


def evaluate_text(
    checkpoint: Checkpoint,
    text: str,
    *,
    text_field: str = "text",
    sequence_length: int = 2048,
    tokens: int | None = None,
    batch: int = 4,
    dtype: torch.dtype | None = None,
) -> TextResult:
    """Perplexity of a model on the documents of `text`, packed into rows of `sequence_length`.

    Every model sees the same windows. `tokens` bounds how many are read.
    """
    check_sizes(sequence_length, batch, tokens)
    documents = open_documents(text, text_field).epoch(0)
    blocks = blocks_from_text(checkpoint.tokenizer(), documents, sequence_length, tokens)
    model = load_model(checkpoint, dtype)
    check_positions(model, "--sequence-length", sequence_length)
    edges = position_edges(sequence_length)
    result = perplexity(model, blocks, by_position=edges, batch_size=batch)
    return TextResult(checkpoint.name, text, sequence_length, **asdict(result))


def check_sizes(sequence_length: int, batch: int, tokens: int | None) -> None:
    """Raise UserError for the first that is too small."""
    # one token predicts nothing
    for name, value, least in (
        ("sequence-length", sequence_length, 2),
        ("batch", batch, 1),
        ("tokens", tokens, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"--{name} (={value}) must be at least {least}")


def position_edges(sequence_length: int) -> list[int]:
    """0, 64, 128, 256 … up to the length: buckets that double, as context does."""
    edges = [0, 64]
    while edges[-1] < sequence_length:
        edges.append(edges[-1] * 2)
    return edges
