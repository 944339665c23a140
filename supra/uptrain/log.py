"""The log of a run: one line of JSON per step, a progress bar, and the configured trackers."""

import json
import sys
import time
from collections.abc import Callable, Mapping

from accelerate import Accelerator
from tqdm import tqdm

from supra.bench.timing import peak_memory
from supra.uptrain import tree
from supra.uptrain.config import UptrainConfig
from supra.uptrain.processes import on_main
from supra.uptrain.run_log import RunLog

Flops = Callable[[UptrainConfig], dict[str, int]]
"""Counts the FLOPs per token of each stage of a run."""


class Log:
    """All processes call it, but only the main process writes."""

    def __init__(
        self,
        accelerator: Accelerator,
        log: RunLog,
        tokens: int,
        tokens_done: int,
        seconds: Mapping[str, float] | None = None,
    ):
        """tokens, tokens_done: of the run, in all and so far. seconds: by stage, what a token would
        take at the peak of all processes; with them, the log has mfu."""
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.file = open(log.path, "a", encoding="utf-8") if self.main else None  # noqa: SIM115 closed in close()
        self.written, self.seconds = log, seconds or {}
        self.bar = tqdm(disable=True)
        self.total, self.tokens = tokens, tokens_done
        self.restart_clock()

    def begin(self) -> None:
        """Show the progress bar. It is not shown earlier, so that earlier messages have their own
        lines."""
        self.bar = tqdm(
            total=self.total,
            initial=self.tokens,
            unit="tok",
            unit_scale=True,
            disable=not self.main,
            mininterval=1 if sys.stderr.isatty() else 30,  # a log file needs no more
        )
        self.restart_clock()

    def step(self, step: int, stage: str, tokens: int, values: dict[str, float]) -> None:
        """Log one optimizer step; `tokens` counts from the start of the run."""
        speed = (tokens - self.tokens) / (time.perf_counter() - self.started)
        self.bar.set_description(stage, refresh=False)
        if "loss" in values:  # a skipped step has none
            self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
        self.bar.update(tokens - self.tokens)
        memory = peak_memory(self.accelerator.device.type) / 1e9
        costs = {"tokens_per_second": round(speed, 1), "memory_gb": round(memory, 3)}
        if self.seconds:
            costs["mfu"] = round(speed * self.seconds[stage], 4)
        self._write(step, {"stage": stage, "tokens": tokens, **values, **costs})
        self.tokens = tokens
        self.restart_clock()

    def event(self, step: int, stage: str, values: dict[str, float]) -> None:
        """Log something other than a step, such as an evaluation."""
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
        self.say(f"step {step} ({stage}): {numbers}")
        self._write(step, {"stage": stage, **values})

    def restart_clock(self) -> None:
        """Keep evaluations and checkpoints out of tokens_per_second."""
        self.started = time.perf_counter()

    def say(self, line: str) -> None:
        if self.main:
            tqdm.write(f"supra: {line}", file=sys.stderr)

    def last(self, step: int, key: str) -> float | None:
        """The last value that was logged under `key` at `step`; None in other processes than the
        main one."""
        return self.written.last(step, key) if self.main else None

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()

    def _write(self, step: int, values: dict) -> None:
        if self.file:
            print(json.dumps({"step": step, **values}), file=self.file, flush=True)
        self.accelerator.log(values, step=step)


def seconds_per_token(
    config: UptrainConfig, accelerator: Accelerator, count: Flops | None
) -> dict[str, float]:
    """What a token of each stage takes at the peak of all processes; {} if it is not known."""
    if config.peak_tflops is None or count is None:
        return {}
    rate = config.peak_tflops * 1e12 * accelerator.num_processes
    found = on_main(accelerator, lambda: count(config))
    return {name: flops / rate for name, flops in found.items()}


def tracker_config(config: UptrainConfig) -> dict[str, int | float | str]:
    """The settings as trackers take them."""
    flat = tree.flatten(config.model_dump(mode="json"))
    return {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in flat.items()
    }
