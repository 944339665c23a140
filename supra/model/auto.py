"""The entry for transformers' Auto classes: reads a config and registers its family's classes."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from supra.errors import UserError
from supra.model import configuration  # may be half imported: its first import leads here


class SupraConfig(PreTrainedConfig):
    """The entry for AutoConfig: `from_dict` returns the config class of the base family."""

    model_type = "supra"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if not isinstance(config_dict.get("base_model_type"), str):
            raise UserError(
                "config.json has model_type 'supra' but no base_model_type: "
                "convert the model again with `supra convert`"
            )
        return _registered(config_dict, **kwargs)


def converted_config(
    base: PreTrainedConfig, layers: list[str], options: dict[str, dict[str, Any]]
) -> PreTrainedConfig:
    """The config of `base` converted with these mixers: one name per layer, options by name."""
    # not at the top: this module is imported while that one is, see supra/model/registration.py
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    fields = base.to_dict()
    fields["base_model_type"] = fields.pop("model_type")
    fields["supra"] = {
        "format_version": configuration.FORMAT_VERSION,
        "layers": layers,
        "options": options,
    }
    language_model = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[fields["base_model_type"]]
    fields["architectures"] = [f"Supra{language_model}"]
    return _registered(fields)


def _registered(fields: dict[str, Any], **kwargs):
    """What `from_dict` of the family's config class returns; its models are registered as well."""
    # not at the top: it needs AutoModel, which transformers has not imported yet
    from supra.model.modeling import register_family

    config = configuration.config_class(fields["base_model_type"])
    found = config.from_dict(fields, **kwargs)
    register_family(config)
    return found


AutoConfig.register("supra", SupraConfig, exist_ok=True)
