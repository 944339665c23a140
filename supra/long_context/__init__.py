"""Texts longer than those a model was trained on: what becomes of its states, and cures."""

from supra.long_context.policy import set_policy, use_policy
from supra.mixers.policy import StatePolicy

__all__ = ["StatePolicy", "set_policy", "use_policy"]
