"""The training state in a checkpoint: accelerate's state, each process's position in its data, and
the states that its rows begin with."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from supra.checkpoint.files import disk_errors, staged_folder
from supra.errors import UserError
from supra.uptrain.data import BlockStream
from supra.uptrain.initial_state import InitialState
from supra.uptrain.manifest import write_manifest
from supra.uptrain.mixture import Mixture
from supra.uptrain.origin import ORIGIN
from supra.uptrain.run_folder import RunFolder
from supra.uptrain.shards import expect_moments
from supra.uptrain.shared_rows import SharedRows
from supra.uptrain.spread import is_sharded


@dataclass
class SavedState:
    """Every process writes its own part; the main process also writes the manifest and origin."""

    accelerator: Accelerator
    folder: RunFolder
    origin: dict[str, str]
    changed: list[str]  # accepted differences from the last checkpoint
    rows: SharedRows

    def write(
        self,
        step: int,
        stream: BlockStream | Mixture,
        initial_state: InitialState | None,
        facts: dict[str, float | str],
    ) -> None:
        """Write a checkpoint, completely or not at all. Raises UserError for a full disk.

        `facts` of this step stand beside the fingerprints of the origin.
        """
        main = self.accelerator.is_main_process
        target = self.folder.checkpoint(step)
        try:
            with staged_folder(target) if main else disk_errors() as staging:
                (staging,) = broadcast_object_list([staging])
                self.accelerator.save_state(str(staging))
                if self.rows.rank == 0:
                    position = json.dumps(stream.state_dict())
                    self._position_file(staging).write_text(position, encoding="utf-8")
                if initial_state:
                    save_file(initial_state.state_dict(), self._rows_file(staging))
                self.accelerator.wait_for_everyone()
                if main:
                    origin = json.dumps({"step": step, **facts, **self.origin}, indent=1)
                    (staging / ORIGIN).write_text(origin, encoding="utf-8")
                    write_manifest(staging)
        except OSError as error:
            raise UserError(
                f"the checkpoint of step {step} cannot be written: {error}. Make room on the disk "
                f"of out (={self.folder.path}), and the same command continues from the checkpoint "
                "before it"
            ) from error

    def read(self, checkpoint: Path, model: nn.Module, stream: BlockStream | Mixture) -> bool:
        """Load a checkpoint of `model`, and move `stream` to its position. Returns whether the text
        of every process has that position. Raises UserError if the checkpoint does not load."""
        readers = self.rows.readers
        written_by = len(list(checkpoint.glob("data-*.json")))
        if written_by != readers:
            what = "processes" if self.rows.size == 1 else f"groups of {self.rows.size} processes"
            raise UserError(
                f"{checkpoint} was written by {written_by} {what}, and there are {readers} "
                f"now: start {written_by} {what}, because each has its own position in the data"
            )
        with self._loading(checkpoint):
            position = self._position_file(checkpoint).read_text(encoding="utf-8")
            stream.load_state_dict(json.loads(position))
        self.read_models(checkpoint, model)
        return all(gather_object([stream.found]))

    def read_models(self, checkpoint: Path, model: nn.Module) -> None:
        """Load the weights of `model`, optimizer and random states, but no position in the text."""
        with self._loading(checkpoint):
            if is_sharded(self.accelerator):
                expect_moments(model, checkpoint)
            self.accelerator.load_state(str(checkpoint))

    def read_rows(self, checkpoint: Path, initial_state: InitialState) -> None:
        """Load the states that rows begin with, in the middle of the stage extend."""
        with self._loading(checkpoint):
            initial_state.load_state_dict(load_file(self._rows_file(checkpoint)))

    @contextmanager
    def _loading(self, checkpoint: Path) -> Iterator[None]:
        """Turn any error of torch and accelerate into a UserError."""
        try:
            yield
        except UserError:
            raise
        except (Exception, CheckpointException) as error:  # FSDP's is not an Exception
            logging.getLogger(__name__).debug("loading %s failed", checkpoint, exc_info=True)
            reason = " ".join(str(error).split())[:300]
            if self.changed:
                raise UserError(
                    f"{checkpoint} does not fit the changes ({'; '.join(self.changed)}): "
                    f"{reason}; undo them, or choose another out folder"
                ) from error
            raise self.folder.damaged(checkpoint, f"it does not load ({reason})") from error

    def _position_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"data-{self.rows.reader}.json"

    def _rows_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"states-{self.accelerator.process_index}.safetensors"
