"""The training loop, for one process or many (accelerate), with exact resume."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import DistributedType
from accelerate.utils import broadcast_object_list, set_seed

from supra.checkpoint.card import update_card
from supra.checkpoint.files import staged_folder
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.calibrate import calibrate
from supra.data.packing import Block, check_tokenizer, collate
from supra.data.text import hub_name
from supra.errors import Diverged, UserError
from supra.evaluate.perplexity import perplexity
from supra.losses.chunked import ScoredModel, language_model
from supra.model.original import original
from supra.model.positions import check_positions
from supra.uptrain import models, optim, tree
from supra.uptrain.accelerator import open_accelerator
from supra.uptrain.align import LayerByLayer
from supra.uptrain.config import LAYERWISE, StageConfig, UptrainConfig
from supra.uptrain.data import BlockStream, held_out_blocks, training_documents
from supra.uptrain.end_to_end import EndToEnd
from supra.uptrain.finite import first_not_finite, predicts
from supra.uptrain.initial_state import InitialState, check_extends
from supra.uptrain.log import Log
from supra.uptrain.manifest import listed_files
from supra.uptrain.memory import keep_freed_memory
from supra.uptrain.origin import origin
from supra.uptrain.run_folder import RunFolder
from supra.uptrain.saved_state import SavedState
from supra.uptrain.stages import Stage, plan, tokens_read
from supra.uptrain.stop import stop_signals
from supra.uptrain.teacher import Teacher

T = TypeVar("T")


def train(config: UptrainConfig, accept_changed: bool = False) -> bool:
    """Train as `config` says; the result is config.out/final.

    SIGTERM and SIGINT end the run after the step that is under way, with a checkpoint from which
    the same command goes on to the same weights as a run without interruption. Returns False then.
    With `accept_changed` a run continues even if its config, student, tokenizer, teacher or text
    has changed. Raises UserError (or its subclass Diverged) for what a user can mend, and keeps the
    last checkpoint.
    """
    run = Run(config, accept_changed)
    try:
        with stop_signals() as stop_requested:
            return run.train(stop_requested)
    finally:
        run.close()


class Run:
    """All that a run holds: models, optimizer, data, and the step it is at."""

    def __init__(self, config: UptrainConfig, accept_changed: bool = False):
        self.config, self.accept_changed = config, accept_changed
        self.folder = RunFolder(config.out)
        self.accelerator = open_accelerator(config, self.folder.path)
        with ExitStack() as held:
            self._on_main(lambda: held.enter_context(self.folder.locked()))
            self._open()
            self._held = held.pop_all()

    def _open(self) -> None:
        config, folder, accept = self.config, self.folder, self.accept_changed
        checkpoint, changed = self._on_main(lambda: folder.find_checkpoint(config, accept))
        set_seed(config.seed)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        rows = config.batch.size * config.batch.accumulation * self.accelerator.num_processes
        self.stages = plan(config, rows * config.data.sequence_length)
        for stage in self.stages:
            optim.check_warmup(stage.name, stage.steps, stage.config.schedule)
        self.steps = self.stages[-1].end
        self.step = RunFolder.step_of(checkpoint) if checkpoint else 0
        # the last one when all steps are done, and only the export is missing
        stage = next((x for x in self.stages if self.step < x.end), self.stages[-1])
        self._open_data(stage)
        now = self._on_main(lambda: origin(config, self.documents.dataset))
        if checkpoint:
            changed += self._on_main(lambda: folder.check_origin(checkpoint, now, accept))
        self.saved = SavedState(self.accelerator, folder, now, changed)
        self._open_log()
        self._load_models(fresh=checkpoint is None)
        if checkpoint:
            self._resume(checkpoint)
        self.row: Block | None = None  # of the last step
        self._begin(stage)
        if self.initial_state and self.step > stage.start:
            self.saved.read_rows(checkpoint, self.initial_state)
        if self.accelerator.is_main_process:
            folder.write_config(config)
            folder.prune(config.checkpoint.keep)

    def train(self, stop_requested: Callable[[], bool]) -> bool:
        """False when it was stopped before the end."""
        config = self.config
        if self.step == 0:
            self.evaluate("calibrate" if config.calibrate.tokens else "start")
            self._say_gain("calibrate", self._logged(0, "converted_perplexity"))
        self.log.begin()
        while self.step < self.steps:
            self.train_step()
            ended = self.step == self.stage.end
            if _due(self.step, config.eval.every) or ended:
                self._check_finite()
                self.evaluate(self.stage.name)
            if ended:
                before = self._logged(self.stage.start, "eval_perplexity")
                self._say_gain(self.stage.name, before)
            if stop_requested():
                self.accelerator.set_trigger()
            last = self.step == self.steps
            stop = self.accelerator.check_trigger() and not last
            if stop or last or _due(self.step, config.checkpoint.every):
                self.save()  # the last one too: an export may fail, for want of disk space say
            if stop:
                self.log.say(
                    f"stopped after step {self.step} of {self.steps}: the same command goes on"
                )
                return False
            if ended and not last:
                self._begin(self.stages[self.stages.index(self.stage) + 1])
            self.log.restart_clock()
        self.export()
        return True

    def train_step(self) -> None:
        """One optimizer step on all micro-batches of all processes."""
        config, stage = self.config, self.stage
        batches = [
            collate(islice(self.stream, config.batch.size))
            for _ in range(config.batch.accumulation)
        ]
        self.row = {name: x[:1] for name, x in batches[0].items()}
        values = self.objective.add_gradients(batches)
        loss, norm = values["loss"], values["grad_norm"]
        if not math.isfinite(loss + norm):
            raise self._diverged(
                f"step {self.step + 1}: the loss is {loss} and the gradient norm {norm}; this step "
                "changed no weights"
            )
        factor = optim.schedule_factor(self.step - stage.start, stage.steps, stage.config.schedule)
        optim.set_rates(self.optimizer, factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        values["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        self.log.step(self.step, stage.name, tokens_read(self.stages, self.step), values)

    def evaluate(self, stage: str) -> None:
        """Held-out perplexity.

        Every process evaluates all of it: sharded models need all processes in every forward pass.
        """
        self._report_perplexity(stage, {"eval": self.model})

    def save(self) -> None:
        """Write a checkpoint. Raises Diverged if weights or predictions are not finite."""
        self._check_finite()
        self.saved.write(self.step, self.stream, self.initial_state)
        if self.accelerator.is_main_process:
            self.folder.prune(self.config.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def export(self) -> None:
        """Write the result to out/final."""
        self._check_finite()
        state = self.accelerator.get_state_dict(self.model)
        state = {name.removeprefix("model."): x for name, x in state.items()}
        if self.accelerator.is_main_process:
            with staged_folder(self.folder.final) as staging:
                models.export(self.config, state, self.tokenizer, staging)
                update_card(
                    staging,
                    tokens=tokens_read(self.stages, self.step),
                    results=self.folder.perplexities(),
                    dataset=self.hub_text,
                )
        self.log.say(f"done: {self.folder.final}")
        self.accelerator.wait_for_everyone()

    def _check_finite(self) -> None:
        """Raises Diverged in every process if weights or predictions are not finite."""
        found = first_not_finite(self.model, self.optimizer)
        if found is None and self.row is not None:
            with self._autocast():
                if not predicts(self.model, self.row, self.accelerator.device):
                    found = "what the model predicts"
        if found:
            raise self._diverged(f"after step {self.step} {found} overflowed: nothing is saved")

    def _diverged(self, what: str) -> Diverged:
        stage = self.stage.config
        checkpoint = self.folder.last_checkpoint()
        goes_on = "the same command begins anew"
        if checkpoint:
            goes_on = f"--accept-changed goes on from {checkpoint.name} with the new rate"
        return Diverged(
            f"{what}. Lower {self.stage.name}.optimizer.lr (={stage.optimizer.lr}) or lengthen "
            f"{self.stage.name}.schedule.warmup (={stage.schedule.warmup}): {goes_on}"
        )

    def close(self) -> None:
        self.log.close()
        self.accelerator.end_training()
        self._held.close()

    def _on_main(self, act: Callable[[], T]) -> T:
        """Run `act` in the main process only. Every process returns its result or raises its
        error."""
        outcome: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome[0] = act()
            except (UserError, OSError) as error:
                outcome[1] = error
        result, error = broadcast_object_list(outcome)
        if error is not None:
            raise error
        return result

    def _open_data(self, stage: Stage) -> None:
        config = self.config
        self.tokenizer = find_checkpoint(config.student).tokenizer()
        check_tokenizer(self.tokenizer)
        self.held_out = held_out_blocks(config, self.tokenizer)
        self.documents = training_documents(config)
        self.hub_text = hub_name(config.data.path)
        for later in self.stages:
            if later.config.segments:  # no run of hours should then end for want of a document
                next(self._blocks(later))
        self.stream = self._blocks(stage)

    def _blocks(self, stage: Stage) -> BlockStream:
        """This process's, from the start of its documents."""
        return BlockStream(
            self.documents,
            self.tokenizer,
            self.config.data.sequence_length,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            segments=stage.config.segments,
            min_document_tokens=self.config.data.min_document_tokens,
        )

    def _open_log(self) -> None:
        self.accelerator.init_trackers("supra", _tracker_config(self.config))
        logged = self.step
        if self.accelerator.is_main_process:
            logged = self.folder.truncate_log(self.step)
        self.log = Log(
            self.accelerator,
            self.folder,
            tokens=tokens_read(self.stages, self.steps),
            tokens_done=tokens_read(self.stages, self.step),
        )
        if logged < self.step:
            self.log.say(
                f"{self.folder.log} has lost lines: it has {logged} of {self.step} steps; the run "
                "goes on, since training does not read them"
            )

    def _load_models(self, fresh: bool) -> None:
        config, accelerator = self.config, self.accelerator
        self.teacher = Teacher(config, accelerator.device) if config.distill else None
        student = models.load_student(config).to(accelerator.device)
        check_positions(student, "data.sequence_length", config.data.sequence_length)
        if config.extend:
            check_extends(student, config)
        self.layers = None  # the teacher in the student, for as long as layers learn from it
        if any(stage.name in LAYERWISE and self.step < stage.end for stage in self.stages):
            self.layers = original(student, own_attention=True)
        if fresh:
            self._set_starting_values(student)
        student = models.make_trainable(student, config)
        optimizer = optim.build_optimizer(student, config.stages)
        optim.freeze_unused(student, optimizer)
        optim.require_gradients(optimizer, self._wrapped_stages())
        self.model, self.optimizer = accelerator.prepare(ScoredModel(student), optimizer)

    def _set_starting_values(self, student: torch.nn.Module) -> None:
        """Before anything is trained: where teacher and student stand, and calibration."""
        if self.teacher is not None and self.config.distill.cache is None:
            self._report_perplexity("start", {"teacher": self.teacher.model})
        if not self.config.calibrate.tokens:
            return
        self._report_perplexity("start", {"converted": student})
        data = self.config.data
        # a stream of its own: the same text for every process, and training begins at its start
        stream = BlockStream(
            self.documents,
            self.tokenizer,
            data.sequence_length,
            min_document_tokens=data.min_document_tokens,
        )
        count = max(1, self.config.calibrate.tokens // data.sequence_length)
        batch = collate(islice(stream, count))
        self.log.say(f"calibrating on {count * data.sequence_length:,} tokens")
        with self._autocast():
            calibrate(
                student,
                batch["input_ids"].to(self.accelerator.device),
                batch["position_ids"].to(self.accelerator.device),
                projections=self.config.calibrate.projections,
            )

    def _begin(self, stage: Stage) -> None:
        """Set the optimizer up for a stage; at its first step the moments start from nothing."""
        config, accelerator, self.stage = stage.config, self.accelerator, stage
        optim.begin_stage(self.optimizer, stage.name, config.optimizer)
        if self.step == stage.start:
            self.optimizer.state.clear()
        alone = accelerator.distributed_type == DistributedType.NO or stage.name in LAYERWISE
        moved = {stage.name: config} if alone else self._wrapped_stages()
        optim.require_gradients(self.optimizer, moved)
        self.stream.cut(config.segments)
        self.initial_state = None
        if stage.name in LAYERWISE:
            self.objective = LayerByLayer(accelerator, *self.layers, config, self._autocast)
        else:  # and what only earlier stages need goes
            self.layers = None
            self.teacher = self.teacher if stage.name == "distill" else None
            if stage.name == "extend":
                student = language_model(accelerator.unwrap_model(self.model).model)
                seed = self.config.seed + accelerator.process_index
                self.initial_state = InitialState(config.initial_state, student, seed)
            self.objective = EndToEnd(
                accelerator,
                self.model,
                self.optimizer,
                config,
                self.teacher,
                self._autocast,
                self.initial_state,
            )
            if self.initial_state and config.initial_state == "noise" and self.step == stage.start:
                rows = islice(self._blocks(stage), self.config.batch.size)
                self.objective.fit_noise(collate(rows))

    def _wrapped_stages(self) -> dict[str, StageConfig]:
        """Those that run through the wrapper of several processes, which expects a gradient all the
        time of what had one when it was made. It is made around something at least."""
        stages = self.config.stages
        return {x: stage for x, stage in stages.items() if x not in LAYERWISE} or stages

    def _resume(self, checkpoint: Path) -> None:
        """Load the training state, and go to the place in the data."""
        if not listed_files(checkpoint):
            self.log.say(
                f"{checkpoint.name} was written by an earlier version: it has no checksums of its "
                "files and no fingerprints of student, teacher and text"
            )
        if self.saved.changed:
            changed = "; ".join(self.saved.changed)
            self.log.say(f"going on from {checkpoint.name} with changes: {changed}")
        if self.saved.read(checkpoint, self.stream):
            return
        if not self.accept_changed:
            raise UserError(
                f"the text ends before the place in it that {checkpoint} names: put back the text "
                "that was there, choose another out folder, or give --accept-changed to go on in "
                "this one"
            )
        where = self.stream.state_dict()
        self.log.say(
            f"the text ends before the place where training was: it goes on in epoch "
            f"{where['epoch'] + 1} after {where['documents']} documents"
        )

    def _report_perplexity(self, stage: str, named: dict[str, torch.nn.Module]) -> None:
        values = {}
        for name, model in named.items() if self.held_out else ():
            with self._autocast():
                result = perplexity(model, self.held_out, batch_size=self.config.batch.size)
            values |= {f"{name}_loss": result.loss, f"{name}_perplexity": result.perplexity}
        if values:
            self.log.event(self.step, stage, values)

    def _say_gain(self, stage: str, before: float | None) -> None:
        after = self._logged(self.step, "eval_perplexity")
        if before and after:
            self.log.say(
                f"{stage}: held-out perplexity {before:,.2f} -> {after:,.2f}, "
                f"divided by {before / after:.3g}"
            )

    def _logged(self, step: int, key: str) -> float | None:
        return self.folder.logged(step, key) if self.accelerator.is_main_process else None

    def _autocast(self) -> torch.autocast:
        # not accelerate's: that one turns the logits into float32, all of them at once
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)


def _tracker_config(config: UptrainConfig) -> dict:
    flat = tree.flatten(config.model_dump(mode="json"))
    return {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in flat.items()
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
