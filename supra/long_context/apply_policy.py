"""Bound the states of a loaded model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from transformers import PreTrainedModel

from supra.mixers.state_policy import StatePolicy
from supra.model.attention import attention_modules


def set_policy(model: PreTrainedModel, policy: StatePolicy | None) -> None:
    """Set the state policy of a converted model and of its config; None removes the policy.

    Call it before a text is read, with an empty cache. Raises UserError when the policy cannot act
    on one of the layers, and then changes nothing.
    """
    before = model.config.state_policy
    try:
        _apply(model, policy)
    except Exception:
        _apply(model, None if before is None else StatePolicy.from_dict(before))
        raise
    model.config.state_policy = None if policy is None else asdict(policy)


@contextmanager
def use_policy(model: PreTrainedModel, policy: StatePolicy | None) -> Iterator[None]:
    """Inside, the model has this policy; afterwards it has its previous one."""
    before = model.config.state_policy
    set_policy(model, policy)
    try:
        yield
    finally:
        set_policy(model, None if before is None else StatePolicy.from_dict(before))


def _apply(model: PreTrainedModel, policy: StatePolicy | None) -> None:
    for attention in attention_modules(model):
        attention.mixer.set_policy(policy, attention.layer_idx)
