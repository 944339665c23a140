"""Models with learned positions, which end with their table."""

from torch import nn
from transformers import PreTrainedModel

from supra.errors import UserError


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions the model has learned (gpt2: 1024); None if positions are not learned."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and ("wpe" in name or "position" in name):
            return model.config.max_position_embeddings
    return None


def check_positions(model: PreTrainedModel, argument: str, tokens: int, answer: int = 0) -> None:
    """Raise UserError if `tokens`, and an answer of up to `answer` more, exceed the model's learned
    positions. `argument` is the name of the value in the message."""
    learned = learned_positions(model)
    if learned is None or tokens + answer <= learned:
        return
    more = f", and the answer takes up to {answer}" if answer else " and reads no further"
    raise UserError(
        f"{argument} (={tokens}): the model has learned {learned} positions{more}: "
        f"give at most {learned - answer}"
    )
