"""Continues a run from a checkpoint, and reports what has changed since it was written."""

from pathlib import Path

from torch import nn

from supra.errors import UserError
from supra.uptrain.lanes import Lanes
from supra.uptrain.log import Log
from supra.uptrain.manifest import listed_files
from supra.uptrain.saved_state import SavedState


def resume(
    saved: SavedState,
    checkpoint: Path,
    model: nn.Module,
    stream: Lanes,
    accept_changed: bool,
    log: Log,
) -> None:
    """Load the training state, and move `stream` to its position in the data.

    Raises UserError when the text does not have that position and changes are not accepted.
    """
    if not listed_files(checkpoint):
        log.say(
            f"{checkpoint.name} was written by an earlier version: it has no checksums of its "
            "files and no fingerprints of student, teacher and text"
        )
    if saved.changed:
        log.say(f"continuing from {checkpoint.name} with changes: {'; '.join(saved.changed)}")
    if saved.read(checkpoint, model, stream):
        return
    if not accept_changed:
        raise UserError(
            f"the text ends before the position that {checkpoint} names: put back the text that "
            "was there, choose another out folder, or give --accept-changed to continue in this "
            "one"
        )
    log.say(f"the text ends before the position where training was: it continues in {stream.place}")
