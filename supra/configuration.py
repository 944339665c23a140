"""The configs of converted models, under the name that checkpoints and pickles import."""

from supra.model.auto import SupraConfig, converted_config
from supra.model.configuration import __getattr__  # noqa: F401 (supra.configuration.SupraLlamaConfig)

__all__ = ["SupraConfig", "converted_config"]
