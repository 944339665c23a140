"""Trains a small model in memory, for experiments: no teacher, no stages, no files."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from supra.data.packing import IGNORE, shifted_labels
from supra.errors import Diverged
from supra.losses.token_losses import token_losses
from supra.uptrain.optim import begin_stage, build_optimizer, schedule_factor, set_rates
from supra.uptrain.stage_settings import OptimizerConfig, ScheduleConfig, TuneConfig


def mean_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor, **forward: Any) -> Tensor:
    """Cross entropy in nats per label, for tokens and labels int64 [N, T].

    Logits are only computed where there is a label. `forward` has more arguments for the model,
    such as a cache with the states before the rows.
    """
    labels = shifted_labels(labels).flatten()
    scored = labels != IGNORE
    settings = {"use_cache": False} | forward
    hidden = model.base_model(input_ids=ids, **settings).last_hidden_state.flatten(0, 1)
    logits = model.get_output_embeddings()(hidden[scored])
    return token_losses(logits, labels[scored]).total / scored.sum()


def fit(
    model: PreTrainedModel,
    next_loss: Callable[[], Tensor],
    steps: int,
    rates: OptimizerConfig,
    title: str,
) -> None:
    """Train as `descend` does, with a progress bar."""
    bar = tqdm(descend(model, next_loss, steps, rates), title, steps, unit="step")
    for _, loss in bar:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)


def descend(
    model: PreTrainedModel, next_loss: Callable[[], Tensor], steps: int, rates: OptimizerConfig
) -> Iterator[tuple[int, float]]:
    """Train with AdamW and a cosine schedule. After each step, yields (steps done, its loss).

    Between two steps the caller may use the model freely. Raises Diverged.
    """
    stage = TuneConfig(optimizer=rates, schedule=ScheduleConfig())
    optimizer = build_optimizer(model, {"tune": stage})
    begin_stage(optimizer, "tune", rates)
    for step in range(steps):
        model.train()
        set_rates(optimizer, schedule_factor(step, steps, stage.schedule))
        loss = next_loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), rates.clip or math.inf)
        if not norm.isfinite():
            raise Diverged(f"diverged at step {step}: the gradient is not finite")
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1, loss.item()
