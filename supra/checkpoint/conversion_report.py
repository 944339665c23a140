"""The conversion report: what became of every tensor, as a file and in a few lines."""

import json
import math
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

import torch

REPORT = "conversion.json"


@dataclass(frozen=True)
class TensorFate:
    """One tensor: `fate` is copied, transformed, new or dropped; `note` says how or why."""

    name: str
    fate: str
    shape: tuple[int, ...]
    dtype: str
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes in the new checkpoint."""
        if self.fate == "dropped":
            return 0
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass
class ConversionReport:
    """Everything that a conversion did, and the command that repeats it.

    `teacher` is empty for an untrained model, whose tensors are all new.
    """

    teacher: str
    family: str
    layers: list[str]
    options: dict[str, dict]
    command: str
    # cost of converting each layer alone, in nats per token; empty unless costs chose what is kept
    layer_costs: list[float] = field(default_factory=list)
    tensors: list[TensorFate] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)  # of the written tensors, by name

    def write(self, folder: Path) -> None:
        """Write the report into `folder` as conversion.json."""
        (folder / REPORT).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def values(self, *fates: str) -> int:
        """The number of values in all tensors with one of these fates."""
        return sum(math.prod(x.shape) for x in self.tensors if x.fate in fates)

    def lines(self) -> list[str]:
        """The report for a terminal."""
        lines = [f"{self.teacher or 'untrained'} ({self.family}): {describe_layers(self.layers)}"]
        for name, options in self.options.items():
            if options:
                lines.append(f"{name}: " + ", ".join(f"{k}={v}" for k, v in options.items()))
        if self.layer_costs:
            lines.append(" layer nats per token")
            for layer, (cost, name) in enumerate(zip(self.layer_costs, self.layers, strict=True)):
                lines.append(f"{layer:6d} {cost:14.6f}  {'kept' if name == 'softmax' else name}")
        fates = ("copied", "transformed", "new", "dropped") if self.teacher else ("new",)
        for fate in fates:
            some = [x for x in self.tensors if x.fate == fate]
            note = f"  ({some[0].note})" if some and some[0].note else ""
            lines.append(
                f"{fate:>12}: {len(some):5d} tensors {self.values(fate):15,d} values{note}"
            )
        return lines


def describe_layers(layers: list[str]) -> str:
    """The layers in words: `layers 0-2 supra, layer 3 softmax`."""
    parts = []
    for name, run in groupby(enumerate(layers), key=lambda pair: pair[1]):
        at = [index for index, _ in run]
        where = f"layer {at[0]}" if len(at) == 1 else f"layers {at[0]}-{at[-1]}"
        parts.append(f"{where} {name}")
    return ", ".join(parts)
