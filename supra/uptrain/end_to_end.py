"""The gradient of one step of the stages distill and tune: losses on the model's last logits."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from supra.losses import Losses, token_losses
from supra.packing import IGNORE, Block, shifted_labels
from supra.uptrain.config import DistillConfig, TuneConfig
from supra.uptrain.optim import drop_gradients
from supra.uptrain.teacher import Teacher


class EndToEnd:
    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,  # a ScoredModel, wrapped
        optimizer: torch.optim.Optimizer,
        stage: DistillConfig | TuneConfig,
        teacher: Teacher | None,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.teacher = teacher if isinstance(stage, DistillConfig) else None
        self.stage, self.autocast = stage, autocast
        self.next_token = stage.next_token if self.teacher else 1.0
        self.kl = stage.kl if self.teacher else 0.0

    def add_gradients(self, batches: Sequence[Block]) -> dict[str, float]:
        """Gradient of a mean over all tokens of all micro-batches of all processes, clipped.

        Returns the losses and the gradient's norm before clipping.
        """
        valid = sum((shifted_labels(batch["labels"]) != IGNORE).sum() for batch in batches)
        valid = self._sum(valid).item()
        sums = torch.zeros(2, device=self.accelerator.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                losses = self._losses(batch, valid)
                self.accelerator.backward(losses.total)
            sums += torch.stack([losses.next_token, losses.kl])
        next_token, kl = (self._sum(sums) / valid).tolist()
        drop_gradients(self.optimizer)
        clip = self.stage.optimizer.clip or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # FSDP shards it
        values = {"loss": self.next_token * next_token + self.kl * kl, "next_token": next_token}
        return values | ({"kl": kl} if self.teacher else {}) | {"grad_norm": norm}

    def _losses(self, batch: Block, valid: int) -> Losses:
        """Losses of a micro-batch, weighted so that gradients add up to the mean's.

        Data parallelism averages gradients over processes, hence the factor.
        """
        batch = {name: column.to(self.accelerator.device) for name, column in batch.items()}
        labels = shifted_labels(batch["labels"]).flatten()
        targets = self.teacher.targets(batch) if self.teacher else lambda rows: None
        scale = self.accelerator.num_processes / valid

        def loss(logits: torch.Tensor, rows: slice) -> Losses:
            return token_losses(
                logits,
                labels[rows],
                targets(rows),
                next_token_weight=self.next_token * scale,
                kl_weight=self.kl * scale,
                temperature=self.stage.temperature if self.teacher else 1.0,
            )

        with self.autocast():
            return self.model(
                loss, input_ids=batch["input_ids"], position_ids=batch["position_ids"]
            )

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
