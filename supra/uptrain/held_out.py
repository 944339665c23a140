"""Held-out perplexity during a run: measured, logged, and compared."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

from torch import nn

from supra.data.packing import Block
from supra.evaluate.perplexity import perplexity
from supra.uptrain.log import Log
from supra.uptrain.run_folder import RunFolder


class HeldOut:
    """Every process evaluates all blocks, because a sharded model needs all processes in every
    forward pass. Without blocks nothing is measured."""

    def __init__(
        self,
        blocks: Sequence[Block],
        batch_size: int,
        folder: RunFolder,
        log: Log,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.blocks, self.batch_size = blocks, batch_size
        self.folder, self.log, self.autocast = folder, log, autocast

    @cached_property
    def digest(self) -> str:
        """Of the blocks: only losses on the same blocks can be compared."""
        digest = hashlib.sha256()
        for block in self.blocks:
            for name in sorted(block):
                digest.update(block[name].numpy().tobytes())
        return digest.hexdigest()

    def report(self, step: int, stage: str, named: dict[str, nn.Module]) -> dict[str, float]:
        """Log the loss and perplexity of each model, under its name, and return them."""
        values = {}
        for name, model in named.items() if self.blocks else ():
            with self.autocast():
                result = perplexity(model, self.blocks, batch_size=self.batch_size)
            values |= {f"{name}_loss": result.loss, f"{name}_perplexity": result.perplexity}
        if values:
            self.log.event(step, stage, values)
        return values

    def say_gain(self, step: int, stage: str, before: float | None) -> None:
        """Print how a stage changed the student's perplexity from `before`."""
        after = self.logged(step, "eval_perplexity")
        if before and after:
            self.log.say(
                f"{stage}: held-out perplexity {before:,.2f} -> {after:,.2f}, "
                f"divided by {before / after:.3g}"
            )

    def logged(self, step: int, key: str) -> float | None:
        """The last value in the log; None in other processes than the main one."""
        return self.folder.logged(step, key) if self.log.main else None
