"""Tiny tokenizers, checkpoints and inputs, for the tests of supra and of packages built on it."""

from supra.data.synthetic import (
    LANGUAGES,
    AssociativeRecall,
    Example,
    Induction,
    MultiQueryRecall,
    RecentRecall,
)
from supra.testing.tiny import (
    MAIN_FAMILIES,
    VOCABULARY,
    future_gradient,
    mixer_inputs,
    tiny_checkpoint,
    tiny_config,
    tiny_tokenizer,
    untrained_model,
)

__all__ = [
    "LANGUAGES",
    "MAIN_FAMILIES",
    "VOCABULARY",
    "AssociativeRecall",
    "Example",
    "Induction",
    "MultiQueryRecall",
    "RecentRecall",
    "future_gradient",
    "mixer_inputs",
    "tiny_checkpoint",
    "tiny_config",
    "tiny_tokenizer",
    "untrained_model",
]
