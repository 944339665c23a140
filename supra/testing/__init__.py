"""Tiny tokenizers, checkpoints and inputs, for tests of supra and of what builds on it."""

from supra.testing.tiny import (
    LANGUAGES,
    MAIN_FAMILIES,
    VOCABULARY,
    AssociativeRecall,
    Example,
    Induction,
    MultiQueryRecall,
    RecentRecall,
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
