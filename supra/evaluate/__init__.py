"""How good a model is, how fast it decodes, and how much it carries along."""

from supra.evaluate.perplexity import Perplexity, blocks_from_text, perplexity
from supra.evaluate.speed import decode_speed
from supra.evaluate.state import cache_bytes, state_bytes

__all__ = [
    "Perplexity",
    "blocks_from_text",
    "cache_bytes",
    "decode_speed",
    "perplexity",
    "state_bytes",
]
