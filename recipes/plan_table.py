"""Writes the table of large models in docs/guides/plan.md, by the arithmetic of `supra plan`.

python recipes/plan_table.py
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from supra.checkpoint.files import replace_between
from supra.errors import command
from supra.planning import compute
from supra.planning.hardware import GB, Gpus, Hardware, Rate
from supra.planning.measure import Measured, Models, measure
from supra.planning.memory import LIMIT
from supra.planning.plan import flops_of, pass_of
from supra.planning.remedies import Situation, without_teacher
from supra.planning.settings import Conversion, find_models, read_settings
from supra.uptrain import stages
from supra.uptrain.config import UptrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "plan.md"
RATE = Rate(tflops=989.0)  # of an H100 in bf16
SHAPES: dict[str, dict[str, Any]] = {  # from the config.json of the published models
    "Mistral 7B": {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": None,
    },
    "Llama 3 70B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
}  # fmt: skip
OURS = ("gradient_checkpointing=true",)


@dataclass(frozen=True)
class Row:
    """A run under recipes/launch/fsdp.yaml on nodes of 8 GPUs; `overrides` are settings beside the
    recipe's."""

    shape: str
    mixer: str
    recipe: str
    nodes: int
    overrides: tuple[str, ...] = ()
    filled_cache: bool = False


ROWS = (
    Row("Mistral 7B", "supra_paper", "supra_paper", 1, ("batch.accumulation=16",)),
    Row("Mistral 7B", "supra_paper", "supra_paper", 8, ("batch.accumulation=2",)),
    Row("Mistral 7B", "mamba2", "supra", 1, (*OURS, "batch.size=2")),
    Row("Mistral 7B", "mamba2", "supra", 8, (*OURS, "batch.size=1")),
    Row("Llama 3 70B", "mamba2", "supra", 1, (*OURS, "batch.size=2")),
    Row("Llama 3 70B", "mamba2", "supra", 8, (*OURS, "batch.size=1")),
    Row("Llama 3 70B", "mamba2", "supra", 8, (*OURS, "batch.size=1", *(
        "distill.top_k=64", "distill.cache=kept"
    )), filled_cache=True),
)  # fmt: skip


@command
def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as name:
        for shape, sizes in SHAPES.items():
            folder = Path(name) / shape
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(sizes))
        lines = [
            "| model and mixer | recipe and settings | GPUs | stage | peak, GB | fits | hours |",
            "| --- | --- | --- | --- | ---: | --- | ---: |",
            *(line for row in ROWS for line in lines_of(row, Path(name))),
        ]
    replace_between(PAGE, "plans", "\n".join(lines))
    print("\n".join(lines))


def lines_of(row: Row, folder: Path) -> Iterator[str]:
    """The lines of a run, one for each stage."""
    hardware = Hardware(Gpus(8, 80), row.nodes, "fsdp")
    config, models = found(row, folder)
    settings = ", ".join(f"`{x}`" for x in row.overrides) + " and filled" * row.filled_cache
    first = [f"{row.shape}, `{row.mixer}`", f"`{row.recipe}`: {settings}"]
    first.append(f"{hardware.processes} × {hardware.gpus.gigabytes} GB")
    for stage in stages.plan(config, hardware.readers):
        counts = measured(row.shape, row.mixer, row.recipe, stage.name, folder)
        if row.filled_cache and stage.name == "distill":
            counts = replace(
                counts,
                sizes=without_teacher(counts.sizes),
                work=replace(counts.work, teacher=0, teacher_softmax=0),
            )
        run = pass_of(config, hardware, stage)
        peak = Situation(models, config, stage.name, counts.sizes, run).memory.peak
        flops = flops_of(stage, counts, run)
        hours = compute.hours(flops, hardware.processes, RATE.tflops, RATE.mfu)
        hours = f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
        fits = "yes" if peak <= LIMIT * hardware.memory else "no"
        yield f"| {' | '.join(first)} | `{stage.name}` | {peak / GB:.1f} | {fits} | {hours} |"
        first = [""] * len(first)


def found(row: Row, folder: Path) -> tuple[UptrainConfig, Models]:
    conversion = Conversion(str(folder / row.shape), row.mixer, {})
    config = read_settings(row.recipe, row.overrides, conversion)
    return config, find_models(config, conversion)


@cache
def measured(shape: str, mixer: str, recipe: str, stage: str, folder: Path) -> Measured:
    """Counts of a stage, which are the same for all numbers of GPUs and rows."""
    config, models = found(Row(shape, mixer, recipe, 1), folder)
    return measure(models, config, stage, Hardware(Gpus(8, 80), 1, "fsdp"))


if __name__ == "__main__":
    main()
