"""Results of finished parts in a folder, so that an interrupted suite goes on where it stopped.

A file belongs to a model, a part and all settings that the part depends on. So a folder also saves
measuring a teacher again for its next student.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from supra.checkpoint.files import staged_file
from supra.checkpoint.json_files import read_fields
from supra.evaluate.suite.measure import Measure


class KeptParts:
    """The folder; None keeps nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def find(self, part: str, source: dict[str, Any]) -> list[Measure] | None:
        """The measures of a part, if they were kept."""
        file = self._file(part, source)
        if file is None or not file.is_file():
            return None
        return [Measure(**measure) for measure in read_fields(file)["measures"]]

    def keep(self, part: str, source: dict[str, Any], measures: list[Measure]) -> None:
        """Write the measures of a finished part."""
        if (file := self._file(part, source)) is None:
            return
        content = {"source": source, "measures": [asdict(measure) for measure in measures]}
        with staged_file(file) as staging:
            staging.write_text(json.dumps(content), encoding="utf-8")

    def _file(self, part: str, source: dict[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(json.dumps([part, source], sort_keys=True).encode()).hexdigest()
        return self.folder / f"{part}-{digest[:16]}.json"
