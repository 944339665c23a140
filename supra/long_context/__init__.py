"""Texts longer than those a model was trained on: how its states behave there, and cures."""

from supra.long_context.apply_policy import set_policy, use_policy
from supra.mixers.state_policy import StatePolicy

__all__ = ["StatePolicy", "diagnose", "set_policy", "use_policy"]


def __getattr__(name: str):
    """Import `diagnose` only when it is used: it imports `datasets`, which policies do not need."""
    if name == "diagnose":
        from supra.long_context.diagnosis import diagnose

        return diagnose
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
