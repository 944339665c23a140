"""Uptraining: train a converted model back to quality.

    supra uptrain --config supra data.path=foo.jsonl distill.optimizer.lr=3e-4
    accelerate launch -m supra.uptrain --config …

`train(config)` is the same from Python. A run is calibration and up to five stages:
`orient` and `align` train every layer by itself (align.py), `distill`, `tune` and `extend` the
model end to end (end_to_end.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supra.uptrain.config import UptrainConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> UptrainConfig:
    """The settings of a YAML file, or of a recipe that comes with supra, by name. `a.b=c` replaces
    one of its values. Raises UserError."""
    from supra.uptrain import shipped, tree

    return tree.load(shipped.find_recipe(path), overrides)


def outline() -> str:
    """All settings with their defaults and meanings, as lines for a terminal."""
    from supra.settings.outline import outline
    from supra.uptrain.config import UptrainConfig

    return outline(UptrainConfig)


def schema() -> dict[str, Any]:
    """The JSON schema of the settings, for editors and other tools; recipes/schema.json is this."""
    from supra.settings.schema import json_schema
    from supra.uptrain.config import UptrainConfig

    return json_schema(UptrainConfig, "Settings of `supra uptrain`")


def train(
    config: UptrainConfig,
    accept_changed: bool = False,
    flops_per_token: Callable[[UptrainConfig], dict[str, int]] | None = None,
) -> bool:
    """Train as `config` says; the result is config.out/final. See `supra.uptrain.loop`.

    flops_per_token: counts the FLOPs per token of each stage, for peak_tflops; the command takes
        `supra.planning.plan.flops_per_token`.
    """
    from supra.uptrain.rules import check

    check(config)  # of one that was made by hand, only single settings have been checked
    # a wrong config is reported before the seconds that torch and transformers take
    from supra.uptrain.loop import train

    return train(config, accept_changed, flops_per_token)


def __getattr__(name: str) -> Any:
    # on demand, since pydantic takes 0.1 s, and `supra --help` needs none of it
    if name != "UptrainConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from supra.uptrain.config import UptrainConfig

    return UptrainConfig
