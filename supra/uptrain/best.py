"""The checkpoint with the lowest held-out loss: kept, named, and exported."""

from pathlib import Path

from torch import nn

from supra.uptrain.config import CheckpointConfig
from supra.uptrain.held_out import HeldOut
from supra.uptrain.log import Log
from supra.uptrain.processes import on_main
from supra.uptrain.saved_state import SavedState


class BestCheckpoint:
    """All processes ask together, and the main process looks."""

    def __init__(self, settings: CheckpointConfig, saved: SavedState, held_out: HeldOut):
        self.settings, self.saved, self.held_out = settings, saved, held_out
        self.accelerator, self.folder = saved.accelerator, saved.folder

    def _find(self) -> tuple[Path | None, float]:
        return self.folder.best_checkpoint(self.held_out.digest)

    def is_beaten(self, loss: float | None) -> bool:
        """Whether the best checkpoint is kept, and this loss is below its loss."""
        if loss is None or not self.settings.best:
            return False
        self.saved.finish()
        return on_main(self.accelerator, lambda: loss < self._find()[1])

    def facts(self, loss: float | None) -> dict[str, float | str]:
        """What a checkpoint says of its held-out loss; None if it was not measured."""
        if loss is None:
            return {}
        return {"held_out_loss": loss, "held_out": self.held_out.digest}

    def prune(self) -> None:
        """Delete the checkpoints that are neither the last ones nor the best."""
        text = self.held_out.digest
        on_main(self.accelerator, lambda: self.folder.prune(self.settings, text))

    def take(self, step: int, model: nn.Module, log: Log) -> int:
        """Say which checkpoint is the best, and go back to its weights if they are exported.
        Returns the step whose weights `model` has then."""
        best, loss = on_main(self.accelerator, self._find)
        if best is None:
            return step
        log.say(f"best: {best}, with a held-out loss of {loss:.4f}")
        found = self.folder.step_of(best)
        if self.settings.best != "export" or found == step:
            return step
        on_main(self.accelerator, lambda: self.folder.check_whole(best))
        self.saved.read_models(best, model)
        return found
