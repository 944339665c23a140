"""Values out of YAML text, and back."""

import re
from typing import Any

import yaml

from supra.errors import UserError, shown

# 1e-4, 5E6, 1.5e3: numbers in YAML 1.2 and in JSON, but texts to PyYAML, which reads YAML 1.1
SCIENTIFIC = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)[eE][-+]?[0-9]+$")


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The value of a YAML text; `where` names it in errors.

    Raises UserError, also for a key that occurs twice in a mapping: PyYAML would take the last.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise UserError(f"{where} is not valid YAML here: lists in lists, too deep") from None
    except Exception as error:  # PyYAML raises other errors for a month 13 or `!!int ''`
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def to_yaml(value: Any) -> str:
    """The YAML text of `value`, which `parse_yaml` reads as `value` again."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        lines = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                lines.setdefault(key.value, []).append(key.start_mark.line + 1)
        for key, places in lines.items():
            if len(places) > 1:
                where = " and ".join(map(str, places))
                raise ValueError(f"{shown(key)} stands in lines {where}: keep one")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that look like numbers to the loader."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+.0123456789"))
