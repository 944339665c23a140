"""In-context learning: a mapping that only the examples in the prompt tell, by number of examples.

The sets of shots are nested: the four shots of a prompt are the first four of its sixteen, and all
numbers of shots get the same queries. So the numbers differ by what more shots bring, not by which
words were drawn. The tasks are those of Todd et al. 2023 (function vectors, arXiv 2310.15213).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from supra.data.packing import plain_tokens, start_tokens
from supra.errors import UserError
from supra.evaluate.suite.measure import ACCURACY, Measure
from supra.evaluate.tasks.prompts import continuation_tokens
from supra.evaluate.tasks.scoring import Row, score_groups
from supra.model.positions import check_positions

PART = "in_context"
FIELDS = {"task": "text", "input": "text", "output": "text"}
SHOTS = (0, 4, 16, 48)
SETS, QUERIES = 5, 8  # sets of shots of a task, and queries that follow each of them
ASKED, ANSWER, END = "Input: {}\nOutput:", " {}", "\n\n"

Example = tuple[str, str]
"""An input and its output."""


@dataclass(frozen=True)
class ShotSet:
    """Examples of one task, in the order in which a prompt shows them, and what is asked then."""

    task: str
    shots: list[Example]
    queries: list[Example]


def draw_sets(
    records: Sequence[dict[str, str]], shots: Sequence[int], limit: int | None, seed: int
) -> list[ShotSet]:
    """Sets of shots for every task. No query is among its shots, and no input occurs twice.

    limit: the maximum number of queries of a task.
    Raises UserError for a task with too few inputs.
    """
    tasks: dict[str, dict[str, str]] = {}
    for record in records:
        tasks.setdefault(record["task"], {}).setdefault(record["input"], record["output"])
    most = max(shots)
    sets = SETS if limit is None else min(SETS, limit)
    queries = QUERIES if limit is None else min(QUERIES, limit // sets)
    drawn = []
    for task, examples in tasks.items():
        if len(examples) < most + queries:
            raise UserError(
                f"in-context task {task!r} has {len(examples)} inputs, and {most} shots with "
                f"{queries} queries need {most + queries}: lower --shots"
            )
        generator = Random(f"{seed} {task}")
        for _ in range(sets):
            some = generator.sample(list(examples.items()), most + queries)
            drawn.append(ShotSet(task, some[:most], some[most:]))
    return drawn


def prompt_rows(tokenizer: PreTrainedTokenizerBase, drawn: ShotSet, shots: int) -> list[Row]:
    """A row for each query: the shots, the query, and its answer up to the end of the line."""
    start, shown = start_tokens(tokenizer), "".join(map(_shot, drawn.shots[:shots]))
    rows = []
    for asked, answer in drawn.queries:
        prompt, said = shown + ASKED.format(asked), ANSWER.format(answer)
        whole = len(continuation_tokens(tokenizer, prompt, said)) + 1  # and the first of END
        # in front of a further query, as in the shots: at the end of a text, blank lines may be
        # another token
        ids = continuation_tokens(tokenizer, prompt, said + END + ASKED)[:whole]
        rows.append(Row([*start, *plain_tokens(tokenizer, prompt), *ids], len(ids)))
    return rows


def measure_in_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[ShotSet],
    shots: Sequence[int],
    *,
    batch: int,
    bar: tqdm | None = None,
) -> list[Measure]:
    """For each number of shots, the share of queries whose whole answer greedy decoding gives.

    An item is a set of shots, because its queries are not independent. Shots are read once for all
    queries that follow them.
    """
    groups = [prompt_rows(tokenizer, drawn, count) for count in shots for drawn in sets]
    longest = max(len(row.tokens) for group in groups for row in group)
    check_positions(model, f"--shots: the longest prompt of {max(shots)} shots", longest)
    scores = iter(score_groups(model, groups, batch, bar))
    measures = []
    for count in shots:
        hits = [[score.greedy for score in next(scores)] for _ in sets]
        values = [sum(some) / len(some) for some in hits]
        tasks = [drawn.task for drawn in sets]
        name = f"{count} shots"
        measures.append(Measure(PART, name, ACCURACY, values, [1.0] * len(values), tasks))
    return measures


def _shot(example: Example) -> str:
    asked, answer = example
    return ASKED.format(asked) + ANSWER.format(answer) + END
