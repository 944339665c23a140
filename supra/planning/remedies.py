"""What to change where a stage does not fit, and what it saves."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from supra.planning.measure import Models, measure
from supra.planning.memory import Memory, Pass, Sizes, end_to_end, layer_by_layer
from supra.uptrain.config import LoraConfig, UptrainConfig
from supra.uptrain.stage_settings import LAYERWISE

TOP_K = 64  # of the teacher's tokens, where the config gives no number


@dataclass(frozen=True)
class Remedy:
    """A change to the run: the bytes that it saves at the peak of a process, and the peak then."""

    change: str
    saves: int
    peak: int


@dataclass(frozen=True)
class Situation:
    """A stage as it would run."""

    models: Models
    config: UptrainConfig
    stage: str
    sizes: Sizes
    run: Pass

    @property
    def memory(self) -> Memory:
        """The memory of one process."""
        kind = layer_by_layer if self.stage in LAYERWISE else end_to_end
        return kind(self.sizes, self.run)


Change = Callable[[Situation], tuple[str, Situation] | None]
"""A situation -> what to change and the situation after it; None where it cannot be changed."""


def remedies(now: Situation, limit: int) -> tuple[list[Remedy], Remedy | None]:
    """Changes that bring the peak down, if it is above `limit` bytes.

    First each by itself, and what saves most comes first. Then, if none of them is enough, those
    that save most on top of each other, until it is enough; all of them may not be.
    """
    found = _that_help(now) if now.memory.peak > limit else []
    alone = [remedy for remedy, _ in found]
    if not alone or min(remedy.peak for remedy in alone) <= limit:
        return alone, None
    before, made = now.memory.peak, []
    for _, change in found:
        changed = change(now)
        if now.memory.peak <= limit or changed is None:
            continue
        what, then = changed
        if then.memory.peak < now.memory.peak:
            made.append(what)
            now = then
    return alone, Remedy(" + ".join(made), before - now.memory.peak, now.memory.peak)


def _that_help(now: Situation) -> list[tuple[Remedy, Change]]:
    before, found = now.memory.peak, []
    for change in CHANGES:
        changed = change(now)
        if changed is not None and (peak := changed[1].memory.peak) < before:
            found.append((Remedy(changed[0], before - peak, peak), change))
    return sorted(found, key=lambda x: -x[0].saves)


def _checkpoint(now: Situation) -> tuple[str, Situation] | None:
    if now.stage in LAYERWISE or now.config.extend is not None or now.run.checkpointing:
        return None  # the settings refuse it
    return "gradient_checkpointing=true", replace(now, run=replace(now.run, checkpointing=True))


def _single_rows(now: Situation) -> tuple[str, Situation] | None:
    """The same rows in a step, one after the other."""
    (size, rows), (passes, count) = (
        now.config.of_stage(now.stage, f"batch.{key}") for key in ("size", "accumulation")
    )
    run = replace(now.run, rows=1, accumulates=True)
    return f"{size}=1 {passes}={rows * count}", replace(now, run=run)


def _alone(now: Situation) -> tuple[str, Situation] | None:
    """The other stages have buckets of DDP."""
    others = [name for name in now.config.stages if name not in LAYERWISE]
    if now.stage not in LAYERWISE or not others:
        return None
    nulls = " ".join(f"{name}=null" for name in others)
    teacher = " teacher=null" if now.config.distill is not None else ""
    sizes = replace(now.sizes, bucketed=now.sizes.trained)
    return f"{nulls}{teacher}: {now.stage} in a run of its own", replace(now, sizes=sizes)


def _shard(now: Situation) -> tuple[str, Situation] | None:
    hardware = now.run.hardware
    if hardware.launch == "fsdp" or hardware.processes == 1:
        return None
    run = replace(now.run, hardware=replace(hardware, launch="fsdp"))
    return "recipes/launch/fsdp.yaml", replace(now, run=run)


def _cache(now: Situation) -> tuple[str, Situation] | None:
    if not now.sizes.teacher or now.stage in LAYERWISE:
        return None
    top_k = f"distill.top_k={TOP_K} " if now.config.distill.top_k is None else ""
    change = f"{top_k}distill.cache=FOLDER, filled by an earlier run, in place of the teacher"
    run = replace(now.run, learns_from="top_k")
    return change, replace(now, sizes=without_teacher(now.sizes), run=run)


def without_teacher(sizes: Sizes) -> Sizes:
    """The same, where the teacher's predictions are in a cache."""
    return replace(sizes, teacher=0, teacher_blocks=0)


def _adapt(now: Situation) -> tuple[str, Situation] | None:
    if now.config.lora is not None or now.stage in LAYERWISE:
        return None
    lora = LoraConfig()
    config = now.config.model_copy(update={"lora": lora})
    sizes = measure(now.models, config, now.stage, now.run.hardware).sizes
    sizes = sizes if now.sizes.teacher else without_teacher(sizes)
    return f"lora.rank={lora.rank}", replace(now, config=config, sizes=sizes)


CHANGES: tuple[Change, ...] = (_checkpoint, _single_rows, _alone, _shard, _cache, _adapt)
