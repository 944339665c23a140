"""Loads this checkpoint through the installed package supra; holds no model code of its own."""

try:
    from supra.configuration import SupraConfig
    from supra.modeling import SupraForCausalLM, SupraModel
except ImportError as error:
    raise ImportError(
        "This checkpoint is a recurrent model made with supra, which is not installed: "
        "pip install supra, then load it again."
    ) from error

__all__ = ["SupraConfig", "SupraForCausalLM", "SupraModel"]
