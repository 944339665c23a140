"""How commands print their results."""

from typing import Any


def print_result(result: Any, as_json: bool) -> None:
    """What as_dict() or lines() of a result gives."""
    from supra.checkpoint.json_files import to_json

    print(to_json(result.as_dict(), indent=1) if as_json else "\n".join(result.lines()))
