"""Writes the two tables of docs/results.md, of perplexities and of abilities, from the results of
grid.py.

    python recipes/grid_tables.py
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from supra.checkpoint.files import replace_between
from supra.errors import command
from supra.evaluate.suite.measure import PERPLEXITY

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "results.md"
KEPT = {  # columns of the table of abilities, and the suite's names of what they show
    "LAMBADA": "lambada acc",
    "PIQA": "piqa acc",
    "BLiMP": "blimp acc",
    "in context, 16 shots": "in_context 16 shots",
    "WikiText": "wikitext perplexity",
    "WikiText after 512 tokens": "wikitext perplexity after 512 tokens",
}


@command
def main() -> None:
    argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split())).parse_args()
    rows = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    rows.sort(key=lambda row: (row["tokens"], row.get("ratio", math.inf)))
    for name, table in (("grid", perplexities(rows)), ("abilities", abilities(rows))):
        replace_between(PAGE, name, "\n".join(table))
        print("\n".join(table) + "\n")


def perplexities(rows: list[dict[str, Any]]) -> list[str]:
    """The table of perplexities on held-out text."""
    tuned = {(x["tokens"], x["seed"]): x for x in rows if x["row"] == "teacher_tuned"}
    return [
        "| row | recipe | mixer | softmax layers | tokens | ratio | ratio to the tuned teacher "
        "| excess nats | perplexity | state at 1024 | minutes | machine | seed |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
        *(perplexity_line(row, tuned.get((row["tokens"], row["seed"]))) for row in rows),
    ]


def perplexity_line(row: dict[str, Any], tuned: dict[str, Any] | None) -> str:
    """tuned: the teacher's row after training on the same tokens, if there is one."""
    cells = [row["row"], row["recipe"], row["mixer"], str(len(row["softmax_layers"]))]
    cells.append(f"{row['tokens']:,}")
    if "failed" in row:
        cells += [row["failed"].split(":")[0], "", "", "", "", ""]
    else:
        cells += [
            f"{row['ratio']:.3f}",
            f"{row['perplexity'] / tuned['perplexity']:.3f}" if tuned else "—",
            f"{row['excess_nats']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{row['state_bytes'] / 1e6:.1f} MB",
            f"{row['training_seconds'] / 60:.0f}",
        ]
    return f"| {' | '.join([*cells, row['machine'], str(row['seed'])])} |"


def abilities(rows: list[dict[str, Any]]) -> list[str]:
    """The table of what is kept outside the training text, of the rows that were made with
    --suite."""
    return [
        f"| row | tokens | {' | '.join(KEPT)} | items | seed |",
        f"| --- | ---: | {' | '.join(['---:'] * len(KEPT))} | ---: | ---: |",
        *(ability_line(row) for row in rows if "suite" in row),
    ]


def ability_line(row: dict[str, Any]) -> str:
    """The share of each accuracy that is kept, and perplexities relative to the teacher's."""
    cells = [row["row"], f"{row['tokens']:,}"]
    for title in KEPT.values():
        measure = row["suite"].get(title, {"kept": None})
        if measure["kept"] is None:
            cells.append("—")
        elif measure["kind"] == PERPLEXITY:
            cells.append(f"{1 / measure['kept']:.2f}")
        else:
            cells.append(f"{measure['kept']:.0%}")
    cells.append(str(row.get("suite_limit") or "all"))
    return f"| {' | '.join([*cells, str(row['seed'])])} |"


if __name__ == "__main__":
    main()
