"""The gradient of one step of the stages distill, tune and extend: losses on the model's logits."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from transformers.cache_utils import Cache

from supra.data.packing import IGNORE, Block, shifted_labels
from supra.losses.chunked import hidden_states, language_model
from supra.losses.token_losses import Losses, token_losses
from supra.model.cache import cache_length, detach
from supra.uptrain.initial_state import InitialState
from supra.uptrain.optim import drop_gradients
from supra.uptrain.shards import whole
from supra.uptrain.shared_rows import SharedRows
from supra.uptrain.spread import is_sharded
from supra.uptrain.stage_settings import DistillConfig, ExtendConfig, TuneConfig
from supra.uptrain.teacher import Teacher

INPUTS = ("input_ids", "position_ids")


class EndToEnd:
    """Trains the whole model: next-token loss, and in distill also the KL to the teacher."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,  # a ScoredModel, wrapped by accelerate
        optimizer: torch.optim.Optimizer,
        stage: DistillConfig | TuneConfig | ExtendConfig,
        teacher: Teacher | None,
        autocast: Callable[[], AbstractContextManager],
        initial_state: InitialState | None = None,  # for extend
        rows: SharedRows | None = None,
    ):
        self.initial_state = initial_state
        self.rows = rows or SharedRows(accelerator)
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.teacher = teacher if isinstance(stage, DistillConfig) else None
        self.stage, self.autocast = stage, autocast
        self.next_token = stage.next_token if self.teacher else 1.0
        self.kl = stage.kl if self.teacher else 0.0

    def add_gradients(self, batches: Sequence[Block]) -> dict[str, float]:
        """Add the clipped gradient of the mean loss over all tokens of all processes.

        Returns the losses and the gradient's norm before clipping.
        """
        batches = [batch | {"labels": shifted_labels(batch["labels"])} for batch in batches]
        valid = sum((self.rows.part(batch["labels"]) != IGNORE).sum() for batch in batches)
        if self.accelerator.num_processes > 1:  # labels are on the host: else there is no wait
            valid = self._sum(valid)
        valid = max(1, valid.item())  # a step of questions alone has no gradient
        sums = torch.zeros(2, device=self.accelerator.device)
        count = len(batches) * (self.stage.segments or 1)
        with self.rows.shared_by(self.model) as shared:
            for number, (batch, cache) in enumerate(self._parts(batches), start=1):
                last = number == count
                if cache is not None and not last and self._is_only_read(batch):
                    self._read(batch, cache)
                    continue
                with self._exchange(last):
                    losses = self._losses(batch, valid, cache)
                    self.accelerator.backward(losses.total)
                sums += torch.stack([losses.next_token, losses.kl])
        drop_gradients(self.optimizer)
        clip = self.stage.optimizer.clip or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
        # the one wait for the device in a step
        next_token, kl, norm = torch.cat([self._sum(sums) / valid, whole(norm)[None]]).tolist()
        values = {"loss": self.next_token * next_token + self.kl * kl, "next_token": next_token}
        values |= ({"kl": kl} if self.teacher else {}) | {"grad_norm": norm}
        if shared is not None:  # what this process got from the others of its rows, and waited
            ranks = shared.ranks
            values |= {"exchanged_mb": ranks.bytes / 1e6, "exchange_seconds": ranks.seconds}
        return values

    def _exchange(self, last: bool) -> AbstractContextManager:
        """The context of a pass. Processes add their gradients up after a step's last pass. Under
        FSDP they do after every pass, because until then each would hold a gradient of the whole
        student: 29 GB for a 7B."""
        if last or is_sharded(self.accelerator):
            return nullcontext()
        return self.accelerator.no_sync(self.model)

    def _is_only_read(self, batch: Block) -> bool:
        """Whether a segment needs no gradient, since it has no labels: reading it takes less than a
        third of the time. With several processes each waits for the gradients of the others in
        every pass, and FSDP gathers weights only in calls of the wrapped model."""
        wrapped = self.accelerator.num_processes > 1 or is_sharded(self.accelerator)
        return not wrapped and not (batch["labels"] != IGNORE).any()

    @torch.no_grad()
    def _read(self, batch: Block, cache: Cache) -> None:
        """Bring the states to the end of a segment, in one process, without logits."""
        batch = {name: batch[name].to(self.accelerator.device) for name in INPUTS}
        language = language_model(self.accelerator.unwrap_model(self.model).model)
        with self.autocast():
            hidden_states(language, past_key_values=cache, **batch)

    @torch.no_grad()
    def fit_noise(self, batch: Block) -> None:
        """Measure the size of the noise that rows begin with, on one batch per process."""
        self.model.eval()
        for part, cache in self._parts([batch]):
            self._losses(part, 1, cache)
        self.model.train()
        self.initial_state.fit(cache, partial(self.accelerator.reduce, reduction="mean"))

    def _parts(self, batches: Sequence[Block]) -> Iterator[tuple[Block, Cache | None]]:
        """The parts of a forward pass: micro-batches, or the segments of each micro-batch in turn,
        with the states before them."""
        for index, batch in enumerate(batches):
            if self.initial_state is None:
                yield batch, None
                continue
            cache = self.initial_state.begin(index, *batch["input_ids"].shape)
            columns = batch | {"position_ids": batch["position_ids"] + cache_length(cache)}
            columns = {name: x.chunk(self.stage.segments, 1) for name, x in columns.items()}
            for parts in zip(*columns.values(), strict=True):
                yield dict(zip(columns, parts, strict=True)), cache
                detach(cache)
            self.initial_state.end(index, cache)

    def _losses(self, batch: Block, valid: int, cache: Cache | None) -> Losses:
        """Losses of a part with shifted labels, on this process's share of its rows. Their weights
        make all gradients add up to the gradient of the mean over `valid` labels.

        The number of processes is a factor, because data parallelism averages gradients over
        processes.
        """
        batch = {name: column.to(self.accelerator.device) for name, column in batch.items()}
        targets = self.teacher.targets(batch) if self.teacher else lambda rows: None
        whole, batch = batch, self.rows.part_of(batch)
        labels = batch["labels"].flatten()
        scale = self.accelerator.num_processes / valid

        def loss(logits: torch.Tensor, rows: slice) -> Losses:
            return token_losses(
                logits,
                labels[rows],
                targets(self.rows.places(rows, whole)),
                next_token_weight=self.next_token * scale,
                kl_weight=self.kl * scale,
                temperature=self.stage.temperature if self.teacher else 1.0,
            )

        with self.autocast():
            return self.model(
                loss,
                **{name: batch[name] for name in INPUTS},
                past_key_values=cache,
            )

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes."""
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
