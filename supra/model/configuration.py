"""The config of a converted model: the base family's own config, plus the mixer of every layer.

`model_type` is "supra" for all families. `config.json` stays flat: it has the base's fields,
`base_model_type`, and the plan under `supra`:

    {"format_version": 1, "layers": ["supra", "softmax", …], "options": {"supra": {…}}}

A `state_policy` beside the plan bounds the states.
"""

import functools
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from supra.checkpoint.untrusted import without_code
from supra.errors import UserError, foreign_errors

FORMAT_VERSION = 1
# what `trust_remote_code=True` loads, from the module that supra/model/remote_code.py writes
AUTO_MAP = {
    "AutoConfig": "modeling_supra.SupraConfig",
    "AutoModel": "modeling_supra.SupraModel",
    "AutoModelForCausalLM": "modeling_supra.SupraForCausalLM",
}

# Written as `attn_implementation`. The family's own classes would ignore the mixers and only warn;
# since this is no attention function's name, they raise an error that shows it. Converted classes
# do not read it.
REFUSED_ELSEWHERE = "supra (import supra, then AutoModelForCausalLM)"


class _ConvertedConfig:
    """Mixed into the base family's config class."""

    state_policy: dict[str, Any] | None = None  # of supra.mixers.state_policy.StatePolicy

    @property
    def _attn_implementation(self) -> str:
        return "supra"

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        """Ignored: any other attention would replace the mixers, and some tools write "eager"."""

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"attn_implementation": REFUSED_ELSEWHERE}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # not at the top: it imports transformers' models, see supra/model/registration.py
        from supra.checkpoint.config_rules import check_config, check_fields, check_plan

        check_fields(config_dict)
        check_plan(config_dict, FORMAT_VERSION)
        fields = {key: value for key, value in config_dict.items() if key != "model_type"}
        # a checkpoint from elsewhere may name code of its own in auto_map
        fields = without_code(fields) | {"auto_map": dict(AUTO_MAP)}
        with foreign_errors("config.json makes no config"):
            found = super().from_dict(fields, **kwargs)
            config = found[0] if isinstance(found, tuple) else found
            config.validate()  # transformers does this only for its own classes
        check_config(config)
        return found


@functools.cache
def config_class(base_model_type: str) -> type[PreTrainedConfig]:
    """The config class of converted models of one family, `SupraLlamaConfig` for "llama"."""
    if base_model_type not in CONFIG_MAPPING:
        raise UserError(
            f"base_model_type {base_model_type!r} is unknown to this version of transformers: "
            "install the version that the checkpoint was written with"
        )
    base = CONFIG_MAPPING[base_model_type]
    fields = {
        "model_type": "supra",
        "base_model_type": base_model_type,
        "__module__": "supra.configuration",
        "__doc__": f"{base.__name__} with the mixer of every layer.",
    }
    return type(f"Supra{base.__name__}", (_ConvertedConfig, base), fields)


def __getattr__(name: str) -> type[PreTrainedConfig]:
    """Classes such as `supra.configuration.SupraLlamaConfig`, for pickles and imports by name."""
    for model_type in CONFIG_MAPPING:
        if name.startswith("Supra") and CONFIG_MAPPING[model_type].__name__ == name[5:]:
            return config_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
