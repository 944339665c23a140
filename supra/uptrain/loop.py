"""The training loop, for one process or many, with exact resume."""

import gc
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import islice

import torch
from accelerate import DistributedType
from accelerate.utils import set_seed

from supra.checkpoint.card import update_card
from supra.checkpoint.files import staged_folder
from supra.checkpoint.opening import find_checkpoint
from supra.conversion.calibrate import calibrate, check_calibrated
from supra.data.packing import collate
from supra.errors import Diverged
from supra.losses.chunked import ScoredModel, language_model
from supra.model.native.adapter import accelerate, adopt
from supra.model.original import original
from supra.model.positions import check_positions
from supra.model.sequence_parallel import check_parts
from supra.uptrain import models, optim, shards, spread
from supra.uptrain.accelerator import open_accelerator
from supra.uptrain.align import LayerByLayer
from supra.uptrain.best import BestCheckpoint
from supra.uptrain.compiled import Compiled
from supra.uptrain.config import UptrainConfig
from supra.uptrain.divergence import Divergence, diverged
from supra.uptrain.end_to_end import EndToEnd
from supra.uptrain.held_out import HeldOut
from supra.uptrain.initial_state import InitialState, check_extends
from supra.uptrain.log import Flops, Log, seconds_per_token, tracker_config
from supra.uptrain.memory import keep_freed_memory
from supra.uptrain.origin import origin
from supra.uptrain.processes import autocast, on_main
from supra.uptrain.resume import resume
from supra.uptrain.run_data import RunData
from supra.uptrain.run_folder import RunFolder
from supra.uptrain.saved_state import SavedState
from supra.uptrain.shared_rows import SharedRows
from supra.uptrain.stage_settings import LAYERWISE
from supra.uptrain.stages import Stage, plan, tokens_read, wrapped_stages
from supra.uptrain.stop import ENDING, WARNING, noted
from supra.uptrain.teacher import Teacher


def train(
    config: UptrainConfig, accept_changed: bool = False, flops_per_token: Flops | None = None
) -> bool:
    """Train as `config` says, and write the result to config.out/final.

    SIGTERM, SIGINT and SIGUSR1 end the run after the current step, with a checkpoint, and the
    result is False. While models are loading, SIGUSR1 ends it after the first step, and the others
    at once. The same command then continues, and ends with the same weights as a run without
    interruption. With `accept_changed`, a run continues even if its config, student, tokenizer,
    teacher or text has changed. With `flops_per_token` and peak_tflops, the log has mfu. Raises
    UserError (or its subclass Diverged) for problems that the user can solve, and keeps the last
    checkpoint.
    """
    with noted(WARNING) as warnings:  # one may come while models are loading
        run = Run(config, accept_changed, flops_per_token)
        try:
            with noted(ENDING, once=True) as endings:
                return run.train(lambda: bool(warnings or endings))
        finally:
            run.close()


class Run:
    """The state of a run: models, optimizer, data, and the number of steps done."""

    def __init__(
        self,
        config: UptrainConfig,
        accept_changed: bool = False,
        flops_per_token: Flops | None = None,
    ):
        self.config, self.accept_changed = config, accept_changed
        self.flops_per_token = flops_per_token
        self.folder = RunFolder(config.out)
        self.accelerator = open_accelerator(config, self.folder.path)
        self.rows = SharedRows(self.accelerator)
        with ExitStack() as held:
            on_main(self.accelerator, lambda: held.enter_context(self.folder.locked()))
            self._open()
            self._held = held.pop_all()

    def _open(self) -> None:
        config, folder, accelerator = self.config, self.folder, self.accelerator
        accept = self.accept_changed
        self._plan_stages()
        find = partial(folder.find_checkpoint, config, self.stages, accept)
        checkpoint, changed = on_main(accelerator, find)
        set_seed(config.seed)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        keeps_casts = not spread.is_sharded(accelerator)
        self.autocast = partial(autocast, accelerator.device, config.precision, keeps_casts)
        self.step = RunFolder.step_of(checkpoint) if checkpoint else 0
        # the last stage, if all steps are done and only the export is missing
        stage = next((x for x in self.stages if self.step < x.end), self.stages[-1])
        self._open_data(stage, folder.lanes_of(checkpoint) if checkpoint else self.rows.readers)
        opened = [documents.dataset for documents in self.data.documents]
        now = on_main(accelerator, lambda: origin(config, opened))
        if checkpoint:
            check = partial(folder.check_origin, checkpoint, now, accept)
            changed += on_main(accelerator, check)
        self.saved = SavedState(accelerator, folder, now, changed, self.rows)
        self._open_log()
        self.best = BestCheckpoint(config.checkpoint, self.saved, self.held_out)
        self._load_models(fresh=checkpoint is None)
        if checkpoint:
            resume(self.saved, checkpoint, self.model, self.stream, accept, self.log)
        self.divergence = Divergence(config.max_skipped_steps, self._diverged)
        if checkpoint:
            skipped = on_main(accelerator, lambda: folder.skipped_steps(checkpoint))
            self.divergence.skipped = skipped
        self._begin(stage)
        if self.initial_state and self.step > stage.start:
            self.saved.read_rows(checkpoint, self.initial_state)
        on_main(accelerator, lambda: folder.write_config(config))
        self.best.prune()

    def _plan_stages(self) -> None:
        self.stages = plan(self.config, self.rows.readers)
        for stage in self.stages:
            optim.check_warmup(stage.name, stage.steps, stage.config.schedule)
        self.steps = self.stages[-1].end

    def _open_data(self, stage: Stage, lanes: int) -> None:
        self.data = RunData(self.config, self.rows.reader, self.rows.readers, lanes)
        for later in self.stages:
            # fail now, not after hours, if a document or the text is not long enough
            if later.config.segments or later.row != stage.row:
                self.data.rows(*later.row).step(lanes)
        self.stream = self.data.rows(*stage.row)

    def train(self, stop_requested: Callable[[], bool]) -> bool:
        """Run all remaining steps and export the result. False if the run was stopped before."""
        config = self.config
        if self.step == 0:
            self.evaluate("calibrate" if config.calibrate.tokens else "start")
            before = self.log.last(0, "converted_perplexity")
            self.held_out.say_gain(0, "calibrate", before)
        self.log.begin()
        while self.step < self.steps:
            self.train_step()
            ended, loss = self.step == self.stage.end, None
            if _due(self.step, config.eval.every) or ended:
                self._check_finite()
                loss = self.evaluate(self.stage.name)
            if ended:
                before = self.log.last(self.stage.start, "eval_perplexity")
                self.held_out.say_gain(self.step, self.stage.name, before)
            if stop_requested():
                self.accelerator.set_trigger()
            last = self.step == self.steps
            stop = self.accelerator.check_trigger() and not last
            due = _due(self.step, config.checkpoint.every) or self.best.is_beaten(loss)
            if stop or last or due:
                self.save(loss)  # also after the last step, because the export may fail
            if stop or last:
                self._settle()
            if stop:
                self.log.say(
                    f"stopped after step {self.step} of {self.steps}: the same command continues"
                )
                return False
            if ended and not last:
                self._begin(self.stages[self.stages.index(self.stage) + 1])
            self.log.restart_clock()
        self.export()
        return True

    def train_step(self) -> None:
        """One optimizer step on all micro-batches of all processes."""
        stage = self.stage
        rows = iter(self.stream.step(stage.rows))
        batches = [collate(islice(rows, stage.batch_size)) for _ in range(stage.accumulation)]
        values = self.objective.add_gradients(batches)
        if self.divergence.accepts(self.step + 1, values, batches[0]):
            number = self.step - stage.start
            factor = optim.schedule_factor(number, stage.steps, stage.config.schedule)
            optim.set_rates(self.optimizer, factor)
            self.optimizer.step()
            values["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        else:
            values = self._skip()
        self.optimizer.zero_grad()
        self.step += 1
        if self.config.data.sources:
            values["source_tokens"] = self.data.source_tokens(
                self.stream, self.accelerator, self.rows.size
            )
        self.log.step(self.step, stage.name, tokens_read(self.stages, self.step), values)

    def _skip(self) -> dict[str, int]:
        """Leave out a step. Returns what is logged in place of its values."""
        if self.initial_state:
            self.initial_state.drop_carried()
        self.log.say(self.divergence.said)
        return {"skipped": self.divergence.skipped}

    def evaluate(self, stage: str) -> float | None:
        """Log the held-out perplexity, and return the loss; None without held-out text."""
        return self.held_out.report(self.step, stage, {"eval": self.model}).get("eval_loss")

    def save(self, loss: float | None) -> None:
        """Write a checkpoint, with the held-out loss if it was measured at this step. Raises
        Diverged if weights or predictions are not finite."""
        self._check_finite()
        passes = {stage.name: stage.passes for stage in self.stages}
        self._settle()
        facts = {"skipped": self.divergence.skipped, "passes": passes, **self.best.facts(loss)}
        self.saved.write(self.step, self.stream, self.initial_state, facts)
        self._clear_moments()

    def _settle(self) -> None:
        """Wait for the last checkpoint, and delete those that are not kept any more."""
        self.saved.finish()
        self.best.prune()

    def export(self) -> None:
        """Write the result to out/final."""
        self._check_finite()
        if self.config.checkpoint.best:
            self.step = self.best.take(self.step, self.model, self.log)
        state = self.accelerator.get_state_dict(self.model)
        state = {name.removeprefix("model."): x for name, x in state.items()}
        if self.accelerator.is_main_process:
            with staged_folder(self.folder.final) as staging:
                models.export(self.config, state, self.data.tokenizer, staging)
                update_card(
                    staging,
                    tokens=tokens_read(self.stages, self.step),
                    results=self.folder.log.perplexities(self.step),
                    datasets=self.data.hub_texts,
                )
        self.log.say(f"done: {self.folder.final}")
        self.accelerator.wait_for_everyone()

    def _check_finite(self) -> None:
        """Raises Diverged in every process if weights or outputs are not finite."""
        with self.autocast():
            self.divergence.check(self.step, self.model, self.optimizer, self.accelerator.device)

    def _diverged(self, what: str) -> Diverged:
        self.saved.finish()
        return diverged(what, self.stage, self.folder.last_checkpoint())

    def close(self) -> None:
        self.data.close()
        self.saved.close()
        self.log.close()
        self.accelerator.end_training()
        self._held.close()

    def _open_log(self) -> None:
        self.accelerator.init_trackers("supra", tracker_config(self.config))
        logged = self.step
        if self.accelerator.is_main_process:
            logged = self.folder.log.truncate(self.step)
        self.log = Log(
            self.accelerator,
            self.folder.log,
            tokens=tokens_read(self.stages, self.steps),
            tokens_done=tokens_read(self.stages, self.step),
            seconds=seconds_per_token(self.config, self.accelerator, self.flops_per_token),
        )
        if logged < self.step:
            self.log.say(
                f"{self.folder.log.path} has lost lines: it has {logged} of {self.step} steps; the "
                "run continues, because training does not need them"
            )
        blocks, size = self.data.held_out, self.config.batch.size
        self.held_out = HeldOut(self.accelerator, blocks, size, self.log, self.autocast)

    def _load_models(self, fresh: bool) -> None:
        config, accelerator = self.config, self.accelerator
        self.teacher = Teacher(config, accelerator) if config.distill else None
        student = spread.load(accelerator, find_checkpoint(config.student), models.DTYPE)
        for setting, length in self._row_lengths():
            check_positions(student, setting, length)
        self.compiled = Compiled(student, config.compile)
        if adopt(student):  # recurrent itself: its layers run as those of mixers do
            accelerate(student)
        if config.extend:
            on_main(accelerator, lambda: check_extends(student, config))
        if self.rows.size > 1:
            check_parts(student)
        self.layers = None  # the student's original attention, while layers learn from it
        units = []
        if any(stage.name in LAYERWISE and self.step < stage.end for stage in self.stages):
            self.layers = original(student, own_attention=True)
            units = shards.attention_classes(student)
        if fresh:
            self._set_starting_values(student)
        student = models.make_trainable(student, config)
        optimizer = optim.build_optimizer(student, config.stages)
        optim.freeze_unused(student, optimizer)
        optim.require_gradients(optimizer, wrapped_stages(self.config))
        model = ScoredModel(student, units)
        learns = self.layers and spread.is_sharded(accelerator)
        shared = shards.separate(self.layers[0], student) if learns else []
        self.model, self.optimizer = spread.prepare(accelerator, model, optimizer)
        if learns:
            shards.shard_teacher(accelerator, self.layers[0], shared)
            shards.run_whole(self.model, accelerator.device)

    def _row_lengths(self) -> set[tuple[str, int]]:
        """The settings of the lengths of rows that the student reads, with their values."""
        config = self.config
        lengths = {(stage.length_setting, stage.sequence_length) for stage in self.stages}
        if self.data.held_out or config.calibrate.tokens:
            lengths.add(("data.sequence_length", config.data.sequence_length))
        return lengths

    def _set_starting_values(self, student: torch.nn.Module) -> None:
        """Before training: log the perplexity of teacher and student, and calibrate the student."""
        if self.teacher is not None and self.config.distill.cache is None:
            self.held_out.report(self.step, "start", {"teacher": self.teacher.model})
        if spread.is_sharded(self.accelerator):
            on_main(self.accelerator, lambda: self._calibrate(student))
        else:
            self._calibrate(student)

    def _calibrate(self, student: torch.nn.Module) -> None:
        """Calibrate the student if the config says so; else check that it needs no calibration."""
        settings = self.config.calibrate
        if not settings.tokens:
            check_calibrated(student)
            return
        student.to(self.accelerator.device)
        alone = spread.is_sharded(self.accelerator)
        self.held_out.report(self.step, "start", {"converted": student}, alone)
        batch = self.data.calibration_batch(settings.tokens)
        self.log.say(f"calibrating on {batch['input_ids'].numel():,} tokens")
        inputs = (batch[x].to(self.accelerator.device) for x in ("input_ids", "position_ids"))
        with self.autocast():
            calibrate(student, *inputs, projections=settings.projections)

    def _begin(self, stage: Stage) -> None:
        """Prepare optimizer and objective for a stage. Its first step starts with empty moments."""
        config, accelerator, self.stage = stage.config, self.accelerator, stage
        optim.begin_stage(self.optimizer, stage.name, config.optimizer)
        self._clear_moments()
        alone = accelerator.distributed_type == DistributedType.NO or stage.name in LAYERWISE
        moved = {stage.name: config} if alone else wrapped_stages(self.config)
        shards.reshard(self.model)
        optim.require_gradients(self.optimizer, moved)
        self.stream.cut(*stage.row)
        self.initial_state = None
        self.compiled.begin(self.layers if stage.name in LAYERWISE else None)
        if stage.name in LAYERWISE:
            if self.teacher:
                self.teacher.forget()  # the layers learn from another one
            self.objective = LayerByLayer(accelerator, *self.layers, config, self.autocast)
        else:
            self.layers = None  # free what only earlier stages need
            self.teacher = self.teacher if stage.name == "distill" else None
            self._begin_end_to_end(stage)
        gc.collect()  # a model that FSDP has split refers to itself in circles

    def _clear_moments(self) -> None:
        """Empty AdamW's moments as long as the stage has changed no weight. This is needed after
        saving, too: FSDP's saving fills empty moments and counts a step."""
        if self.step - self.divergence.skipped <= self.stage.start:
            self.optimizer.state.clear()

    def _begin_end_to_end(self, stage: Stage) -> None:
        config, accelerator = stage.config, self.accelerator
        if stage.name == "extend":
            student = language_model(accelerator.unwrap_model(self.model).model)
            first = self.rows.reader * stage.accumulation
            passes = range(first, first + stage.accumulation)
            kind, seed = config.initial_state, self.config.seed
            self.initial_state = InitialState(kind, student, seed, passes)
        self.objective = EndToEnd(
            accelerator,
            self.model,
            self.optimizer,
            config,
            self.teacher,
            self.autocast,
            self.initial_state,
            self.rows,
        )
        if self.initial_state and config.initial_state == "noise" and self.step == stage.start:
            rows = self.data.rows(*stage.row).step(stage.rows)
            self.objective.fit_noise(collate(rows[: stage.batch_size]))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
