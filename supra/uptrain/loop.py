"""The training loop, for one process or many (accelerate), with exact resume."""

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, set_seed
from torch.distributed.tensor import DTensor

from supra.calibrate import calibrate
from supra.card import update_card
from supra.checkpoints import find_checkpoint
from supra.errors import UserError, check_choice
from supra.evaluate.perplexity import perplexity
from supra.files import staged_folder
from supra.losses import Losses, token_losses
from supra.packing import IGNORE, Block, check_tokenizer, collate, shifted_labels
from supra.uptrain import models, tree
from supra.uptrain.config import UptrainConfig
from supra.uptrain.data import BlockStream, held_out_blocks, training_documents
from supra.uptrain.log import Log
from supra.uptrain.memory import keep_freed_memory
from supra.uptrain.optim import build_optimizer, schedule_factor, set_rates
from supra.uptrain.run_folder import RunFolder


def train(config: UptrainConfig) -> None:
    """Train as `config` says; the result is config.out/final.

    SIGTERM and SIGINT end the run after the step that is under way, with a checkpoint from which
    the same command goes on to the same weights as a run without interruption.
    """
    run = Run(config)
    try:
        with _stop_signals() as stop_requested:
            run.train(stop_requested)
    finally:
        run.close()


class Run:
    """All that a run holds: models, optimizer, data, and the step it is at."""

    def __init__(self, config: UptrainConfig):
        self.config = config
        self.folder = RunFolder(config.out)
        self.accelerator = _accelerator(config, self.folder.path)
        self.folder.check(config)
        self.accelerator.wait_for_everyone()  # all have checked before one writes
        if self.accelerator.is_main_process:
            self.folder.write_config(config)
        set_seed(config.seed)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        rows = config.batch.size * config.batch.accumulation * self.accelerator.num_processes
        self.tokens_per_step = rows * config.data.sequence_length
        self.steps = math.ceil(config.budget.total / self.tokens_per_step)
        checkpoint = self.folder.last_checkpoint()
        self.step = RunFolder.step_of(checkpoint) if checkpoint else 0
        self._open_data()
        self._open_log()
        self._load_models(fresh=checkpoint is None)
        if checkpoint:
            self._resume(checkpoint)

    def train(self, stop_requested: Callable[[], bool]) -> None:
        config = self.config
        if self.step == 0:
            self.evaluate()
        self.log.begin()
        while self.step < self.steps:
            self.train_step()
            if _due(self.step, config.eval.every) or self.step == self.steps:
                self.evaluate()
            if stop_requested():
                self.accelerator.set_trigger()
            stop = self.accelerator.check_trigger() and self.step < self.steps
            if stop or (_due(self.step, config.checkpoint.every) and self.step < self.steps):
                self.save()
            if stop:
                self.log.say(
                    f"stopped after step {self.step} of {self.steps}: the same command goes on"
                )
                return
            self.log.restart_clock()
        self.export()

    def train_step(self) -> None:
        """One optimizer step: a mean over all tokens of all micro-batches of all processes."""
        config = self.config
        batches = [
            collate(islice(self.stream, config.batch.size))
            for _ in range(config.batch.accumulation)
        ]
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
        loss = config.loss.next_token * next_token + config.loss.kl * kl
        clip = config.optimizer.clip or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # FSDP shards it
        if not math.isfinite(loss + norm):
            raise UserError(
                f"step {self.step + 1}: the loss is {loss} and the gradient norm {norm}; this step "
                f"changed no weights. Lower optimizer.lr (={config.optimizer.lr}) or lengthen "
                f"schedule.warmup (={config.schedule.warmup}), and start in a new out folder"
            )
        factor = schedule_factor(self.step, self.steps, config.schedule)
        set_rates(self.optimizer, factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        values = {"loss": loss, "next_token": next_token, "kl": kl}
        values |= {"lr": config.optimizer.lr * factor, "grad_norm": norm}
        self.log.step(self.step, self.step * self.tokens_per_step, values)

    def evaluate(self) -> None:
        """Held-out perplexity.

        Every process evaluates all of it: sharded models need all processes in every forward pass.
        """
        self._report_perplexity({"eval": self.model})

    def save(self) -> None:
        """Write the training state: accelerate's, and where each process is in its data."""
        target, accelerator = self.folder.checkpoint(self.step), self.accelerator
        main = accelerator.is_main_process
        with staged_folder(target) if main else nullcontext() as staging:
            (staging,) = broadcast_object_list([staging])
            accelerator.save_state(str(staging))
            position = json.dumps(self.stream.state_dict())
            self._position_file(staging).write_text(position, encoding="utf-8")
            accelerator.wait_for_everyone()
        if main:
            self.folder.prune(self.config.checkpoint.keep)
        accelerator.wait_for_everyone()

    def export(self) -> None:
        """Write the result to out/final."""
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            with staged_folder(self.folder.final) as staging:
                models.export(self.config, state, self.tokenizer, staging)
                update_card(
                    staging,
                    tokens=self.step * self.tokens_per_step,
                    results=self.folder.perplexities(),
                )
        self.log.say(f"done: {self.folder.final}")
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.log.close()
        self.accelerator.end_training()

    def _open_data(self) -> None:
        config = self.config
        self.tokenizer = find_checkpoint(config.student).tokenizer()
        check_tokenizer(self.tokenizer)
        self.held_out = held_out_blocks(config, self.tokenizer)
        self.stream = BlockStream(
            training_documents(config),
            self.tokenizer,
            config.data.sequence_length,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )

    def _open_log(self) -> None:
        self.accelerator.init_trackers("supra", _tracker_config(self.config))
        if self.accelerator.is_main_process:
            self.folder.truncate_log(self.step)
        self.log = Log(
            self.accelerator,
            self.folder,
            tokens=self.steps * self.tokens_per_step,
            tokens_done=self.step * self.tokens_per_step,
        )

    def _load_models(self, fresh: bool) -> None:
        self.teacher = models.load_teacher(self.config)
        if self.teacher is not None:
            self.teacher.to(self.accelerator.device)
        student = models.load_student(self.config)
        if fresh:
            self._set_starting_values(student.to(self.accelerator.device))
        student = models.make_trainable(student, self.config)
        optimizer = build_optimizer(student, self.config.optimizer)
        self.model, self.optimizer = self.accelerator.prepare(student, optimizer)

    def _set_starting_values(self, student: torch.nn.Module) -> None:
        """Before anything is trained: where teacher and student stand, and calibration."""
        self._report_perplexity({"teacher": self.teacher} if self.teacher is not None else {})
        if not self.config.calibrate.tokens:
            return
        self._report_perplexity({"converted": student})
        data = self.config.data
        # a stream of its own: the same text for every process, and training begins at its start
        documents = training_documents(self.config)
        stream = BlockStream(documents, self.tokenizer, data.sequence_length)
        count = max(1, self.config.calibrate.tokens // data.sequence_length)
        batch = collate(islice(stream, count))
        self.log.say(f"calibrating on {count * data.sequence_length:,} tokens")
        with self._autocast():
            calibrate(
                student,
                batch["input_ids"].to(self.accelerator.device),
                batch["position_ids"].to(self.accelerator.device),
            )

    def _resume(self, checkpoint: Path) -> None:
        """Load the training state, and go to the place in the data."""
        accelerator = self.accelerator
        written_by = len(list(checkpoint.glob("data-*.json")))
        if written_by != accelerator.num_processes:
            raise UserError(
                f"{checkpoint} was written by {written_by} processes and there are "
                f"{accelerator.num_processes} now: each has its own place in the data"
            )
        position = self._position_file(checkpoint).read_text(encoding="utf-8")
        self.stream.load_state_dict(json.loads(position))
        accelerator.load_state(str(checkpoint))

    def _report_perplexity(self, named: dict[str, torch.nn.Module]) -> None:
        values = {}
        for name, model in named.items() if self.held_out else ():
            with self._autocast():
                result = perplexity(model, self.held_out, batch_size=self.config.batch.size)
            values |= {f"{name}_loss": result.loss, f"{name}_perplexity": result.perplexity}
        if values:
            self.log.event(self.step, values)

    def _position_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"data-{self.accelerator.process_index}.json"

    def _losses(self, batch: Block, valid: int) -> Losses:
        """Losses of a micro-batch, weighted so that gradients add up to the mean's.

        Data parallelism averages gradients over processes, hence the factor.
        """
        weights, scale = self.config.loss, self.accelerator.num_processes / valid
        batch = {name: column.to(self.accelerator.device) for name, column in batch.items()}
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        with self._autocast():
            logits = self.model(**inputs, use_cache=False).logits
        teacher_logits = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher(**inputs, use_cache=False).logits.flatten(0, 1)
        return token_losses(
            logits.flatten(0, 1),
            shifted_labels(batch["labels"]).flatten(),
            teacher_logits,
            next_token_weight=weights.next_token * scale,
            kl_weight=weights.kl * scale,
            temperature=weights.temperature,
        )

    def _autocast(self) -> torch.autocast:
        # not accelerate's: that one turns the logits into float32, all of them at once
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")


def _accelerator(config: UptrainConfig, folder: Path) -> Accelerator:
    available = get_available_trackers()
    for name in config.trackers:
        check_choice("installed tracker", name, [str(tracker) for tracker in available])
    return Accelerator(
        mixed_precision="no",  # see Run._autocast
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # see Run.train_step
        log_with=list(config.trackers) or None,
        project_dir=folder,
    )


def _tracker_config(config: UptrainConfig) -> dict:
    flat = tree.flatten(tree.to_dict(config))
    return {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in flat.items()
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM or SIGINT into a request; a second one acts as it would without us."""
    received, previous = [], {}

    def handle(number, frame):
        received.append(number)
        restore()

    def restore():
        while previous:
            signal.signal(*previous.popitem())

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        restore()
