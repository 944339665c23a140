"""The rows that are done, in a JSON file that is whole at every moment."""

import os
from pathlib import Path
from typing import Any

from supra.checkpoint.json_files import read_fields, to_json
from supra.errors import UserError

FAILED = "failed"
SECONDS = "seconds"


class Results:
    """rows: key -> values, in the order in which they were measured. A row that failed has its
    reason as the value FAILED."""

    def __init__(self, file: Path):
        self.file = file
        found = read_fields(file) if file.exists() else {"machine": None, "rows": []}
        if not {"machine", "rows"} <= set(found):
            raise UserError(f"{file} is not from `supra bench gpu`: name another --folder")
        self.machine: dict[str, Any] | None = found["machine"]
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {
            tuple(row["key"]): row["values"] for row in found["rows"]
        }

    def measured_on(self, machine: dict[str, Any]) -> None:
        """Note the machine. Raises UserError if the rows are from another one."""
        if self.rows and self.machine != machine:
            names = sorted(x for x in machine if (self.machine or {}).get(x) != machine[x])
            raise UserError(
                f"{self.file} has rows of another {', '.join(names)}: name another --folder, or "
                "remove the file"
            )
        self.machine = machine

    def add(self, key: tuple[str, ...], values: dict[str, Any]) -> None:
        """Keep a row, and write the file."""
        self.rows[key] = values
        rows = [{"key": list(key), "values": x} for key, x in self.rows.items()]
        whole = self.file.with_name(self.file.name + ".new")
        whole.write_text(to_json({"machine": self.machine, "rows": rows}, indent=1) + "\n")
        os.replace(whole, self.file)

    def forget_failed(self) -> None:
        """Drop the rows that failed, or whose rival was missing, so that they run again."""
        self.rows = {
            key: x for key, x in self.rows.items() if FAILED not in x and "missing" not in x
        }
