"""`supra eval text`: perplexity of one model on one text."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from supra.checkpoint.opening import Checkpoint
from supra.data.blocks import blocks_from_text
from supra.data.text import open_documents
from supra.errors import UserError
from supra.evaluate.perplexity import perplexity
from supra.model.loading import load_model
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
            f"({self.loss:.4f} nats per token, {self.tokens:,} tokens)"
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

    Every model with the same tokenizer sees the same rows. `tokens` is the maximum to read.
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
    """Raise UserError for the first argument that is too small."""
    # a row of one token has nothing to predict
    for name, value, minimum in (
        ("sequence-length", sequence_length, 2),
        ("batch", batch, 1),
        ("tokens", tokens, 1),
    ):
        if value is not None and value < minimum:
            raise UserError(f"--{name} (={value}) must be at least {minimum}")


def position_edges(sequence_length: int) -> list[int]:
    """0, 64, 128, 256 … up to the length: the edges of buckets that double in size."""
    edges = [0, 64]
    while edges[-1] < sequence_length:
        edges.append(edges[-1] * 2)
    return edges
