"""How good a model is, how fast it decodes, and how large its state is."""

from supra.data.blocks import blocks_from_text
from supra.evaluate.perplexity import Perplexity, perplexity
from supra.evaluate.speed import decode_speed
from supra.model.state_size import cache_bytes, state_bytes

__all__ = [
    "Perplexity",
    "blocks_from_text",
    "cache_bytes",
    "decode_speed",
    "perplexity",
    "state_bytes",
]
