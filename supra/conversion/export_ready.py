"""The mixer and the options with which a converted model can be exported."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

from supra.conversion.plan import plan_layers
from supra.errors import UserError, check_choice
from supra.export.targets import TARGETS
from supra.mixers import resolve_mixer
from supra.model.auto import converted_config


def ready_mixer(
    base: PreTrainedConfig,
    target: str,
    mixer: str | None,
    options: dict[str, Any] | None,
    keep_attention: Iterable[int],
    kept: dict[str, dict[str, Any]],
) -> tuple[str, dict[str, Any]]:
    """The mixer for a model of config `base`, and all its options.

    mixer, options: what the user has chosen, which must be something that the target can hold.
    kept: the options of the layers that keep attention, under the name of their mixer.
    Raises UserError with everything that stands in the way.
    """
    check_choice("export_ready", target, TARGETS)
    forms = [form for form in TARGETS[target].FORMS if mixer in (None, form[0])]
    if not forms:
        names = " or ".join(name for name, _ in TARGETS[target].FORMS)
        raise UserError(
            f"mixer (={mixer!r}) is not what {target} has, which is {names}: leave it out"
        )
    obstacles = []
    for name, given in forms:
        name, resolved = resolve_mixer(name, {**given, **(options or {})})
        layers = plan_layers(base.num_hidden_layers, name, keep_attention)
        found = TARGETS[target].obstacles(converted_config(base, layers, {name: resolved, **kept}))
        if not found:
            return name, resolved
        obstacles = obstacles or found
    raise UserError(f"export_ready (={target!r}) is not possible: {'; '.join(obstacles)}")


def check_ready(config: PreTrainedConfig, target: str) -> None:
    """Raise UserError unless a converted model of this config can be exported."""
    if found := TARGETS[target].obstacles(config):
        raise UserError(f"export_ready (={target!r}) is not possible: {'; '.join(found)}")
