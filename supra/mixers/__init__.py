"""The mixers, one final class per file. To add one, write its file and name it in MIXERS."""

import dataclasses
from collections.abc import Container, Iterable
from typing import Any, NamedTuple

from supra.errors import UserError, check_choice
from supra.mixers.base import Mixer, float32_at_least
from supra.mixers.gated_delta import GatedDelta
from supra.mixers.gated_deltanet import GatedDeltaNet
from supra.mixers.h3 import H3
from supra.mixers.inputs import AttentionShape, MixerInputs, Rotary
from supra.mixers.kda import Kda
from supra.mixers.mamba2 import Mamba2
from supra.mixers.nonlinear_gated import NonlinearGatedMixer
from supra.mixers.options import read_options
from supra.mixers.retention import Retention
from supra.mixers.rwkv import Rwkv
from supra.mixers.softmax import Softmax
from supra.mixers.supra import Supra
from supra.mixers.window import Window


class Preset(NamedTuple):
    """A mixer with options, under the name that the literature gives them."""

    name: str
    mixer: str
    options: dict[str, Any]


def by_name(entries: Iterable[Any], taken: Container[str] = ()) -> dict[str, Any]:
    """Mixers or presets by name. Raises ValueError for a name that is in use already."""
    table = {}
    for entry in entries:
        if entry.name in table or entry.name in taken:
            raise ValueError(f"name (={entry.name!r}) is in use already: choose another one")
        table[entry.name] = entry
    return table


MIXERS: dict[str, type[Mixer]] = by_name(
    (
        Softmax,
        Supra,
        Window,
        GatedDelta,
        GatedDeltaNet,
        Kda,
        Mamba2,
        Rwkv,
        H3,
        NonlinearGatedMixer,
        Retention,
    )
)

PRESETS: dict[str, Preset] = by_name(
    (
        Preset(
            "supra_paper", "supra", {"feature_map": "mixed_relu", "decay": "fixed", "scale": False}
        ),
        Preset(
            "t2r",
            "supra",
            {"feature_map": "relu", "decay": "none", "normalize": "sum", "scale": False},
        ),
        Preset(
            "t2r_paper",
            "supra",
            {"feature_map": "shared_relu", "decay": "none", "normalize": "sum", "scale": False},
        ),
        Preset(
            "hedgehog",
            "supra",
            {"feature_map": "hedgehog", "decay": "none", "normalize": "sum", "scale": False},
        ),
        Preset("lolcats", "window", {"decay": "none", "output_gate": False, "sinks": 0}),
        Preset(
            "gated",
            "supra",
            {
                "feature_map": "hedgehog",
                "decay": "gated",
                "normalize": "sum",
                "output_gate": True,
            },
        ),
    ),
    taken=MIXERS,
)

# What `supra convert` takes unless told otherwise: of the mixers without a window, the best after
# 300,000 tokens (docs/results.md), and other engines run it.
DEFAULT_MIXER = GatedDeltaNet.name

# Part of the name of every parameter that conversion adds.
NEW_PARAMETERS = ".mixer."


def resolve_mixer(name: str, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """The mixer's name and all its options, from the name of a mixer or a preset.

    Raises UserError for an unknown name, option or value; the message lists the known ones.
    """
    check_choice("mixer", name, [*MIXERS, *PRESETS])
    preset = PRESETS.get(name, Preset(name, name, {}))
    name = preset.mixer
    known = {field.name for field in dataclasses.fields(MIXERS[name].Options)}
    for key in options or {}:
        if not known:
            raise UserError(f"mixer {name!r} has no options, got {key!r}: leave it out")
        check_choice(f"option of mixer {name!r}", key, known)
    resolved = read_options(MIXERS[name].Options, {**preset.options, **(options or {})})
    return name, dataclasses.asdict(resolved)


def build_mixer(name: str, shape: AttentionShape, options: dict[str, Any]) -> Mixer:
    """The mixer of one layer, with uninitialised parameters. They are float32, whatever the dtype
    of the model around it."""
    name, options = resolve_mixer(name, options)
    with float32_at_least():
        return MIXERS[name](shape, MIXERS[name].Options(**options))


__all__ = [
    "DEFAULT_MIXER",
    "MIXERS",
    "NEW_PARAMETERS",
    "PRESETS",
    "AttentionShape",
    "Mixer",
    "MixerInputs",
    "Rotary",
    "build_mixer",
    "float32_at_least",
    "resolve_mixer",
]
