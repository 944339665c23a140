"""Bound the states of a loaded model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from supra.mixers.state_policy import StatePolicy
from supra.model.recurrent import mixers_of


def set_policy(model: PreTrainedModel, policy: StatePolicy | None) -> None:
    """Set the state policy of a model and of its config; None removes the policy.

    The model is a converted one, or one that is recurrent in transformers itself, such as Mamba-2.
    Call it before a text is read, with an empty cache. Raises UserError when the policy cannot act
    on one of the layers, and then changes nothing.
    """
    before = policy_of(model)
    try:
        _apply(model, policy)
    except Exception:
        _apply(model, None if before is None else StatePolicy.from_dict(before))
        raise
    model.config.state_policy = None if policy is None else asdict(policy)


@contextmanager
def use_policy(model: PreTrainedModel, policy: StatePolicy | None) -> Iterator[None]:
    """Inside, the model has this policy; afterwards it has its previous one."""
    before = policy_of(model)
    set_policy(model, policy)
    try:
        yield
    finally:
        set_policy(model, None if before is None else StatePolicy.from_dict(before))


def policy_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """The `state_policy` in a model's config, which transformers' own families do not know."""
    return getattr(model.config, "state_policy", None)


def _apply(model: PreTrainedModel, policy: StatePolicy | None) -> None:
    for layer, mixer in mixers_of(model).items():
        if mixer is not None:
            mixer.set_policy(policy, layer)
