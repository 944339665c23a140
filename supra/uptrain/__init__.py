"""Uptraining: train a converted model back to quality.

    supra uptrain --config supra data.path=foo.jsonl distill.optimizer.lr=3e-4
    accelerate launch -m supra.uptrain --config …

`train(config)` is the same from Python. A run is calibration and up to five stages:
`orient` and `align` train every layer by itself (align.py), `distill`, `tune` and `extend` the
model end to end (end_to_end.py).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path

from supra.uptrain import shipped, tree
from supra.uptrain.config import UptrainConfig

STOPPED = 130  # exit code of a run that was stopped before its end, as shells have it


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, build the config and train."""
    parser = argparse.ArgumentParser(
        prog="supra uptrain",
        description="Train a converted checkpoint on text, with or without its teacher.",
        epilog=f"{_shipped()}\n\nSettings and their defaults:\n{_defaults()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file, or the name of a recipe below")
    parser.add_argument(
        "--accept-changed",
        action="store_true",
        help="continue a run even if its config, student, tokenizer, teacher or text has changed",
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="replace one of its values")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    if not train(config, arguments.accept_changed):
        sys.exit(STOPPED)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> UptrainConfig:
    """The settings of a YAML file, or of a recipe that comes with supra, by name. `a.b=c` replaces
    one of its values. Raises UserError."""
    return tree.load(UptrainConfig, shipped.find_recipe(path), overrides)


def train(config: UptrainConfig, accept_changed: bool = False) -> bool:
    """Train as `config` says; the result is config.out/final. See `supra.uptrain.loop`."""
    # a wrong config is reported before the seconds that torch and transformers take
    from supra.uptrain.loop import train

    return train(config, accept_changed)


def _shipped() -> str:
    return (
        f"Recipes that come with supra, and files for accelerate launch --config_file:\n"
        f"  {', '.join(shipped.names())}\n"
        f"  {shipped.LAUNCH}/{{{','.join(x.stem for x in sorted(shipped.LAUNCH.iterdir()))}}}.yaml"
    )


def _defaults() -> str:
    return "\n".join(
        f"  {key} = {'(required)' if default is MISSING else json.dumps(default)}"
        for key, default in tree.keys(UptrainConfig).items()
    )
