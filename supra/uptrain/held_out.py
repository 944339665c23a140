"""Held-out perplexity during a run: measured, logged, and compared."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import nn

from supra.data.packing import Block
from supra.evaluate.perplexity import perplexity_of, token_nats
from supra.uptrain.compiled import eagerly
from supra.uptrain.log import Log


class HeldOut:
    """The processes share out the blocks. Without blocks nothing is measured."""

    def __init__(
        self,
        accelerator: Accelerator,
        blocks: Sequence[Block],
        batch_size: int,
        log: Log,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.accelerator, self.blocks, self.batch_size = accelerator, blocks, batch_size
        self.log, self.autocast = log, autocast

    @cached_property
    def digest(self) -> str:
        """Of the blocks: only losses on the same blocks can be compared."""
        digest = hashlib.sha256()
        for block in self.blocks:
            for name in sorted(block):
                digest.update(block[name].numpy().tobytes())
        return digest.hexdigest()

    def report(
        self, step: int, stage: str, named: dict[str, nn.Module], alone: bool = False
    ) -> dict[str, float]:
        """Log the loss and perplexity of each model, under its name, and return them. All processes
        must call it, unless one is `alone` and evaluates all blocks."""
        values = {}
        for name, model in named.items() if self.blocks else ():
            loss = self._loss(model, alone)
            values |= {f"{name}_loss": loss, f"{name}_perplexity": perplexity_of(loss)}
        if values:
            self.log.event(step, stage, values)
        return values

    def _loss(self, model: nn.Module, alone: bool) -> float:
        """Nats per predicted token of all blocks."""
        accelerator = self.accelerator
        first, step = (0, 1) if alone else (accelerator.process_index, accelerator.num_processes)
        own = list(self.blocks[first::step])
        # as many passes in every process, because a sharded model needs all processes in each
        spare = self.blocks[: -(-len(self.blocks) // step) - len(own)]
        sums = torch.zeros(2, dtype=torch.float64)
        with self.autocast(), eagerly():
            found = token_nats(model, [*own, *spare], self.batch_size)
            for number, (nats, _) in enumerate(found):
                if number < len(own):
                    sums[0] += nats.sum()
                    sums[1] += len(nats)
        if step > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum")
        nats, tokens = sums.tolist()
        return nats / tokens

    def say_gain(self, step: int, stage: str, before: float | None) -> None:
        """Print how a stage changed the student's perplexity from `before`."""
        after = self.log.last(step, "eval_perplexity")
        if before and after:
            self.log.say(
                f"{stage}: held-out perplexity {before:,.2f} -> {after:,.2f}, "
                f"divided by {before / after:.3g}"
            )
