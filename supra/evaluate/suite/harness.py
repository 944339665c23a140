"""Tasks of lm-evaluation-harness, on a model that reads what requests share once.

The harness writes the prompts, splits them into tokens and makes the metrics. Only the reading of
the tokens is ours, and its log-likelihoods are those of the harness's own model. This module needs
lm_eval, so it is imported when a task is asked for.
"""

import difflib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, NamedTuple

from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.errors import UserError, foreign_errors
from supra.evaluate.suite.data import evenly
from supra.evaluate.suite.measure import ACCURACY, PERPLEXITY, Measure
from supra.evaluate.tasks.scoring import Row, group_rows, score_groups

Tasks = Mapping[str, Any]
"""What TaskManager.load gives for one name, which may be a group of tasks."""


class SharedPrefixModel(HFLM):
    """The harness's model, with another way to read tokens; `batch` rows in a forward pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: int,
        bar: tqdm | None = None,
    ):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
        self._bar = bar

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        rows = [  # cut from the left where the harness does
            Row([*context, *continuation][-(self.max_length + 1) :], len(continuation))
            for _, context, continuation in requests
        ]
        batch = self.batch_size if override_bs is None else override_bs
        found = score_groups(self.model, group_rows(rows), batch, self._bar)
        return [tuple(score) for group in found for score in group]


def task_manager(own: bool) -> TaskManager:
    """With the harness's own tasks, or, which is faster, without."""
    with _quiet():
        return TaskManager(include_defaults=own)


def load_tasks(manager: TaskManager, task: str | dict[str, Any]) -> Tasks:
    """The task of that name, or of that config. Raises UserError if it cannot be loaded."""
    name = task if isinstance(task, str) else task["task"]
    if name == task and name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise UserError(f"lm-evaluation-harness has no task {name!r}{hint}")
    with foreign_errors(f"task {name!r} cannot be loaded"), _quiet():
        loaded = manager.load([task])
        for leaf in loaded["tasks"].values():  # as simple_evaluate of the harness does
            if leaf.get_config("num_fewshot") is None:
                leaf.set_config(key="num_fewshot", value=0)
            leaf.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def chosen_items(tasks: Tasks, limit: int | None) -> dict[str, list[int]]:
    """The places of the items of every task that are measured: `limit`, at even distances."""
    return {name: evenly(len(task.eval_docs), limit) for name, task in tasks["tasks"].items()}


def measure_tasks(
    part: str,
    tasks: Tasks,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None,
    batch: int,
    bar: tqdm | None = None,
) -> list[Measure]:
    """Every accuracy and perplexity that the harness takes. The tasks of a group are pooled.

    Raises UserError if the tasks have no such measure, or if the harness stops.
    """
    chosen = None if limit is None else chosen_items(tasks, limit)
    with foreign_errors(f"task {part!r} stopped"), _quiet():
        lm = SharedPrefixModel(model, tokenizer, batch, bar)
        found = evaluate(lm, task_dict=dict(tasks), samples=chosen, bootstrap_iters=0)
    measures = _measures(part, tasks["tasks"], found["samples"])
    if not measures:
        raise UserError(f"task {part!r} has neither an accuracy nor a perplexity: leave it out")
    return measures


def _measures(
    part: str, tasks: Mapping[str, Any], samples: Mapping[str, list[dict[str, Any]]]
) -> list[Measure]:
    collected: dict[tuple[str, str], list[_Item]] = {}
    for name, task in tasks.items():
        for sample in samples[name]:
            for item in _items(task, sample):
                collected.setdefault((item.metric, item.kind), []).append(item)
    measures = [_measure(part, items) for items in collected.values()]
    return sorted(measures, key=lambda measure: measure.kind)  # accuracies first


class _Item(NamedTuple):
    metric: str
    kind: str
    value: float
    weight: float = 1.0
    chance: float = 0.0


def _items(task: Any, sample: Mapping[str, Any]) -> Iterator[_Item]:
    """One document's share in each metric, by the rule that the metric is summed up with."""
    rules, better = task.aggregation(), task.higher_is_better()
    chance = 1 / len(sample["resps"]) if task.OUTPUT_TYPE == "multiple_choice" else 0.0
    for metric in sample["metrics"]:
        rule, value = getattr(rules.get(metric), "__name__", None), sample[metric]
        name = metric if sample["filter"] == "none" else f"{metric} {sample['filter']}"
        if rule == "mean" and better.get(metric) is not False:
            yield _Item(name, ACCURACY, float(value), chance=chance)
        elif rule == "perplexity":
            yield _Item(name, PERPLEXITY, -value)
        elif rule == "weighted_perplexity":
            log_likelihood, weight = value
            yield _Item(name, PERPLEXITY, -log_likelihood / weight, float(weight))


def _measure(part: str, items: Sequence[_Item]) -> Measure:
    values, weights = [x.value for x in items], [x.weight for x in items]
    chance = sum(x.chance for x in items) / len(items)
    first, strata = items[0], [part] * len(items)
    return Measure(part, first.metric, first.kind, values, weights, strata, chance)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log and its progress bars; the suite has its own."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
