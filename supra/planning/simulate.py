"""The memory of one process by torch's memory tracker, beside the arithmetic of memory.py.

A step runs with the run's own modules, losses and optimizer, as the first of the processes that a
launch file starts (fake_rank.py). Its tensors are fake: they have a shape and a dtype, and no
memory. The tracker adds up those that live at the same time.

Fake tensors lie on a CPU here, because a GPU's need torch for that GPU. Triton's kernels do not run
on them, so operations have the torch backend. It keeps the same tensors for the backward pass, but
while it runs it makes tensors that a kernel has in its registers.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import PreTrainedConfig, PreTrainedModel

from supra.checkpoint.config_rules import meta_model
from supra.errors import foreign_errors
from supra.losses import chunked, token_losses
from supra.losses.chunked import ScoredModel
from supra.mixers import Mixer
from supra.model.original import original
from supra.planning.activations import check_countable
from supra.planning.fake_rank import CPU, FakeRank, fake_rank
from supra.planning.hardware import Hardware
from supra.planning.measure import DTYPES, Models
from supra.uptrain import models, optim, shards, spread
from supra.uptrain.align import LayerByLayer
from supra.uptrain.config import UptrainConfig
from supra.uptrain.processes import autocast
from supra.uptrain.stage_settings import LAYERWISE
from supra.uptrain.stages import Stage, wrapped_stages

TOTAL = "Total"  # the tracker's name for the sum


@dataclass(frozen=True)
class Simulated:
    """Bytes at the peak: in all, and by the tracker's names for what they are."""

    peak: int
    parts: dict[str, int]


def simulate(found: Models, config: UptrainConfig, stage: Stage, hardware: Hardware) -> Simulated:
    """The most memory that one process takes in a step of the stage, after the first one.

    Raises UserError for a model that does not run on fake tensors.
    """
    trained = _trained_models(found, config, stage)
    with (
        foreign_errors("memory cannot be simulated"),
        _chunks_of_a_gpu(),
        fake_rank(hardware) as rank,
        FakeTensorMode(allow_non_fake_inputs=True),
        _Tracker() as tracker,
    ):
        step = _Step(trained, config, stage, rank)
        tracker.begin(step.held)
        step.run(lambda: tracker.track_external(step.model))
        peak = tracker.get_tracker_snapshot("peak")[CPU]
    parts = {str(kind.value): size for kind, size in peak.items() if kind != TOTAL and size}
    return Simulated(peak[TOTAL], parts)


@dataclass
class _Trained:
    """Models on the meta device: the student, what it learns from in orient and align, and the
    teacher of distill."""

    student: PreTrainedModel
    layers: tuple[PreTrainedModel, list[tuple[nn.Module, nn.Module]]] | None
    teacher: PreTrainedModel | None

    def fake(self) -> None:
        """Give all models fake tensors, and shared ones once."""
        made: dict[int, Tensor] = {}
        for model in (self.student, *(self.layers or ())[:1], self.teacher):
            for x in spread.hold(model) if model is not None else ():
                made.setdefault(x.key, _fake(x.tensor))
                setattr(x.module, x.name, made[x.key])


def _fake(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty


def _trained_models(found: Models, config: UptrainConfig, stage: Stage) -> _Trained:
    student = _meta_model(found.student, torch.float32)
    check_countable(student)
    teacher = None
    if stage.name == "distill":
        teacher = _meta_model(found.teacher, DTYPES[config.precision]).requires_grad_(False)
    layers = original(student, own_attention=True) if stage.name in LAYERWISE else None
    return _Trained(student, layers, teacher)


def _meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config.dtype = dtype
    return meta_model(config).eval()


class _Step:
    """The models of a stage as a process has them, and a step on rows of one document each."""

    def __init__(self, trained: _Trained, config: UptrainConfig, stage: Stage, rank: FakeRank):
        self.stage, self.rank, self.layers = stage, rank, trained.layers
        self.teacher = trained.teacher
        self.autocast = partial(
            autocast, CPU, config.precision, keeps_casts=not spread.is_sharded(rank)
        )
        trained.fake()
        self._wrap(trained.student, config)
        self._fill_moments()
        self.tokens = torch.zeros(stage.batch_size, stage.sequence_length, dtype=torch.int64)

    def _wrap(self, student: PreTrainedModel, config: UptrainConfig) -> None:
        """As Run does it in supra/uptrain/loop.py."""
        stage, rank = self.stage, self.rank
        units = shards.attention_classes(student) if self.layers else ()
        student = models.make_trainable(student, config)
        for module in student.modules():
            if isinstance(module, Mixer):
                module.eval()  # its dropout asks for numbers, which fake tensors do not have
        optimizer = optim.build_optimizer(student, config.stages)
        optim.freeze_unused(student, optimizer)
        optim.require_gradients(optimizer, wrapped_stages(config))
        model = ScoredModel(student, units)
        learns = self.layers and spread.is_sharded(rank)
        shared = shards.separate(self.layers[0], student) if learns else []
        self.model, self.optimizer = spread.prepare(rank, model, optimizer)
        if learns:
            shards.shard_teacher(rank, self.layers[0], shared)
            shards.run_whole(self.model, CPU)
            shards.reshard(self.model)
        if self.teacher is not None and spread.is_sharded(rank):
            spread.shard_blocks(rank, self.teacher)
        optim.begin_stage(self.optimizer, stage.name, stage.config.optimizer)
        alone = rank.num_processes == 1 or self.layers
        moved = {stage.name: stage.config} if alone else wrapped_stages(config)
        optim.require_gradients(self.optimizer, moved)

    def _fill_moments(self) -> None:
        """The optimizer has its moments after the first step."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if group["base_lr"]:
                    parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def held(self) -> list[Any]:
        """What a process has between steps."""
        others = self.layers[0] if self.layers else None, self.teacher
        return [self.model, self.optimizer, *(x for x in others if x is not None)]

    def run(self, name_gradients: Callable[[], None]) -> None:
        """A step: two passes stand for any number above one."""
        stage = self.stage
        passes = stage.accumulation * (stage.config.segments or 1)
        for _ in range(min(passes, 2)):
            if self.layers:
                learner = LayerByLayer(self.rank, *self.layers, stage.config, self.autocast)
                learner.errors({"input_ids": self.tokens}, 1 / passes)
            else:
                self._end_to_end()
            name_gradients()
        optim.drop_gradients(self.optimizer)
        self.optimizer.step()

    def _end_to_end(self) -> None:
        labels, targets = self.tokens.flatten(), self._targets()

        def loss(logits: Tensor, rows: slice) -> token_losses.Losses:
            teacher = targets(rows)
            kl = 0.0 if teacher is None else 1.0
            return token_losses.token_losses(logits, labels[rows], teacher, kl_weight=kl)

        with self.autocast():
            losses = self.model(loss, input_ids=self.tokens)
        losses.total.backward()

    @torch.no_grad()
    def _targets(self) -> Callable[[slice], Any]:
        """What the teacher says of rows of the flattened batch, as Teacher.targets returns it."""
        if self.stage.name != "distill":
            return lambda rows: None
        if (top_k := self.stage.config.top_k) is not None:
            shape = self.tokens.numel(), top_k
            return token_losses.TopK(
                torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float16)
            ).rows
        hidden = chunked.hidden_states(self.teacher, input_ids=self.tokens)
        return torch.no_grad()(lambda rows: chunked.logits_of(self.teacher, hidden[rows]))


class _Tracker(MemTracker):
    """Sums over all modules. What single modules take is not tracked, because the tracker refuses
    modules that run twice, and those that run inside others."""

    def __init__(self):
        super().__init__()
        self._mod_tracker = _NoModules()

    def begin(self, held: list[Any]) -> None:
        """Give what a process holds its names, and forget the peak so far."""
        gc.collect()  # a model that FSDP has split refers to itself in circles
        self.track_external(*held)
        self._peak_mem.clear()
        self._peak_mem_snap.clear()


class _NoModules(nullcontext):
    """In the place of what follows modules; it only knows when gradients are computed."""

    parents: tuple[str, ...] = ()

    @property
    def is_bw(self) -> bool:
        return torch._C._current_graph_task_id() != -1

    def register_user_hooks(self, *hooks: Any) -> None: ...

    def clear_user_hooks(self) -> None: ...


@contextmanager
def _chunks_of_a_gpu() -> Iterator[None]:
    """Logits come in chunks; a CPU's are smaller than a GPU's."""
    sizes = chunked.CHUNK_ELEMENTS, token_losses.CHUNK_ELEMENTS
    before = [x["cpu"] for x in sizes]
    try:
        for x in sizes:
            x["cpu"] = x["cuda"]
        yield
    finally:
        for x, size in zip(sizes, before, strict=True):
            x["cpu"] = size
