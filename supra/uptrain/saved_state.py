"""The training state in a checkpoint: accelerate's state, the position in each lane of the text,
and the states that rows begin with."""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from supra.checkpoint.files import disk_errors, staged_folder
from supra.errors import UserError
from supra.uptrain.initial_state import InitialState
from supra.uptrain.lanes import Lanes
from supra.uptrain.manifest import write_manifest
from supra.uptrain.origin import ORIGIN
from supra.uptrain.processes import on_main
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
    completing: Future[None] | None = None  # the last checkpoint, in the main process
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def write(
        self,
        step: int,
        stream: Lanes,
        initial_state: InitialState | None,
        facts: dict[str, Any],
    ) -> None:
        """Write a checkpoint, completely or not at all. Raises UserError for a full disk.

        The files have their content when this returns. Checksums, and forcing them to the disk,
        take as long again, and a thread does that while training goes on; see `finish`. `facts` of
        this step stand beside the fingerprints of the origin.
        """
        self.finish()
        main = self.accelerator.is_main_process
        target = self.folder.checkpoint(step)
        with self._full_disk(step), ExitStack() as held:
            staging = held.enter_context(staged_folder(target) if main else disk_errors())
            (staging,) = broadcast_object_list([staging])
            self.accelerator.save_state(str(staging))
            if self.rows.rank == 0:
                for lane, position in stream.state_dict().items():
                    file = staging / f"data-{lane}.json"
                    file.write_text(json.dumps(position), encoding="utf-8")
            rows = initial_state.state_dicts() if initial_state else {}
            for number, tensors in rows.items():
                save_file(tensors, _rows_file(staging, number))
            self.accelerator.wait_for_everyone()
            if main:
                origin = json.dumps({"step": step, **facts, **self.origin}, indent=1)
                act = self._complete, step, held.pop_all(), staging, origin
                self.completing = self.thread.submit(*act)

    def _complete(self, step: int, held: ExitStack, staging: Path, origin: str) -> None:
        with self._full_disk(step), held:
            (staging / ORIGIN).write_text(origin, encoding="utf-8")
            write_manifest(staging)

    def finish(self) -> None:
        """Wait until the last checkpoint is complete. Raises UserError if it cannot be."""
        on_main(self.accelerator, lambda: self.completing and self.completing.result())
        self.completing = None

    def close(self) -> None:
        """The same, without the error."""
        self.thread.shutdown()

    @contextmanager
    def _full_disk(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the checkpoint of step {step} cannot be written: {error}. Make room on the disk "
                f"of out (={self.folder.path}), and the same command continues from the checkpoint "
                "before it"
            ) from error

    def read(self, checkpoint: Path, model: nn.Module, stream: Lanes) -> bool:
        """Load a checkpoint of `model`, and move `stream` to its position. Returns whether the text
        of every process has that position. Raises UserError if the checkpoint does not load."""
        self._check_format(checkpoint)
        with self._loading(checkpoint):
            files = {lane: checkpoint / f"data-{lane}.json" for lane in stream.streams}
            stream.load_state_dict(
                {lane: json.loads(x.read_text(encoding="utf-8")) for lane, x in files.items()}
            )
        self.read_models(checkpoint, model)
        return all(gather_object([stream.found]))

    def _check_format(self, checkpoint: Path) -> None:
        """Raise UserError for weights that FSDP has written and this run cannot read, or the other
        way round."""
        written, runs = any(checkpoint.glob("pytorch_model_fsdp*")), is_sharded(self.accelerator)
        if written == runs or not (written or (checkpoint / "model.safetensors").exists()):
            return
        before, now = ("under FSDP" if sharded else "without FSDP" for sharded in (written, runs))
        raise UserError(
            f"{checkpoint} was written {before}, and this run is {now}, which has another format: "
            f"start it with recipes/launch/{'fsdp' if written else 'ddp'}.yaml, on any number of "
            "processes"
        )

    def read_models(self, checkpoint: Path, model: nn.Module) -> None:
        """Load the weights of `model`, optimizer and random states, but no position in the text."""
        with self._loading(checkpoint):
            if is_sharded(self.accelerator):
                expect_moments(model, checkpoint)
            self.accelerator.load_state(str(checkpoint))

    def read_rows(self, checkpoint: Path, initial_state: InitialState) -> None:
        """Load the states that rows begin with, in the middle of the stage extend."""
        with self._loading(checkpoint):
            files = {number: _rows_file(checkpoint, number) for number in initial_state.passes}
            initial_state.load_state_dicts({n: load_file(file) for n, file in files.items()})

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


def _rows_file(checkpoint: Path, number: int) -> Path:
    """The file of a micro-batch's states."""
    return checkpoint / f"states-{number}.safetensors"
