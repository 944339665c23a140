"""Models whose positions are looked up in a table, and end with it."""

from torch import nn
from transformers import PreTrainedModel

from supra.errors import UserError


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many there are, in gpt2 say; None where positions are not learned."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and ("wpe" in name or "position" in name):
            return model.config.max_position_embeddings
    return None


def check_positions(model: PreTrainedModel, argument: str, to: int, answer: int = 0) -> None:
    """Raise UserError where the table has fewer than `to` positions, or than an answer's more."""
    most = learned_positions(model)
    if most is not None and to + answer > most:
        more = f", and the answer takes up to {answer}" if answer else " and reads no further"
        raise UserError(f"{argument} (={to}): the model has learned {most} positions{more}")
