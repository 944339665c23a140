"""The classes of converted models, under the name that checkpoints and pickles import."""

from supra.model.modeling import (
    SupraForCausalLM,
    SupraModel,
    __getattr__,  # noqa: F401 (supra.modeling.SupraLlamaForCausalLM)
)

__all__ = ["SupraForCausalLM", "SupraModel"]
