"""Where the weights of a model lie that is run but not trained: on GPUs, in memory, on the disk."""

import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from supra.errors import UserError

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Placement:
    """device_map: "auto" or another of AUTOMATIC, as in transformers; or one device for all.
    max_memory: bytes of weights at most, by device: the number of a GPU, "mps" or "cpu". Other
        devices get none, and what does not fit lies on the disk. None: what is free.
    offload_folder: for weights on the disk that have another form in the files than in the model,
        such as experts that are stored one by one.

    Raises UserError for devices that are not there, and for settings that would have no effect.
    """

    device_map: str = "auto"
    max_memory: dict[int | str, int] | None = None
    offload_folder: Path | None = None

    def __post_init__(self):
        if self.device_map not in AUTOMATIC:
            _check_device(self.device_map)
            for name, given in (
                ("--max-memory", self.max_memory),
                ("--offload-folder", self.offload_folder),
            ):
                if given is not None:
                    raise UserError(
                        f"{name} has no effect on --device-map (={self.device_map}), which puts "
                        "all weights on one device: give --device-map auto, or leave it out"
                    )
        for device in self.max_memory or ():
            _check_memory_of(device)
        if self.offload_folder is not None and self.offload_folder.is_file():
            raise UserError(f"--offload-folder (={self.offload_folder}) is a file: name a folder")

    def open(self, opener: Callable[..., Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """What the opener, a `from_pretrained`, returns with these settings: model, loading info.
        Files in the offload folder are removed with the model."""
        folder = self._own_folder()
        memory = None if self.max_memory is None else dict(self.max_memory)
        try:
            model, info = opener(
                device_map=self.device_map, max_memory=memory, offload_folder=folder
            )
        except BaseException:
            if folder is not None:
                shutil.rmtree(folder)
            raise
        if folder is not None:
            weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        return model, info

    def _own_folder(self) -> str | None:
        """A new folder in the offload folder: the weights of two models may have equal names."""
        if self.offload_folder is None:
            return None
        try:
            self.offload_folder.mkdir(parents=True, exist_ok=True)
            return tempfile.mkdtemp(prefix="supra-", dir=self.offload_folder)
        except OSError as error:
            raise UserError(
                f"--offload-folder (={self.offload_folder}) cannot be written: {error.strerror}"
            ) from error


def placement(
    device_map: str | None, max_memory: dict[int | str, int] | None, offload_folder: Path | None
) -> Placement | None:
    """The placement that options ask for; None if they ask for none. Raises UserError."""
    if device_map is not None:
        return Placement(device_map, max_memory, offload_folder)
    for name, given in (("--max-memory", max_memory), ("--offload-folder", offload_folder)):
        if given is not None:
            raise UserError(f"{name} needs --device-map auto: give that too, or leave it out")
    return None


def _check_device(name: str) -> None:
    try:
        there = torch.empty(0, device=name).device.type != "meta"  # which holds no numbers
    except Exception:  # each kind of device that torch was built without has its own
        there = False
    if not there:
        raise UserError(
            f"--device-map (={name}) must be {', '.join(AUTOMATIC)} or a device of this machine, "
            "such as cpu"
        )


def _check_memory_of(device: int | str) -> None:
    known = [*range(torch.cuda.device_count()), "cpu"]
    if torch.backends.mps.is_available():
        known.append("mps")
    if device not in known:
        raise UserError(
            f"--max-memory names the device {device!r}, and this machine has "
            f"{', '.join(map(str, known))}: give it as cpu=8GB, or 0=20GB,cpu=60GB with a GPU"
        )
