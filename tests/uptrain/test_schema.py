"""The JSON schema of the settings, which editors check recipes by."""

import json
from pathlib import Path

import pytest
import yaml

from supra import cli, uptrain
from supra.settings.schema import keys, node_at, tree
from supra.uptrain.config import UptrainConfig

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted((RECIPES / "configs").glob("*.yaml"))
TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
    "integer": int, "number": int | float,
}  # fmt: skip
BOUNDS = {
    "minimum": lambda x, bound: x >= bound,
    "exclusiveMinimum": lambda x, bound: x > bound,
    "maximum": lambda x, bound: x <= bound,
    "exclusiveMaximum": lambda x, bound: x < bound,
    "minItems": lambda x, bound: len(x) >= bound,
    "maxItems": lambda x, bound: len(x) <= bound,
    "enum": lambda x, choices: x in choices,
}


def accepts(node, value, definitions):
    """Whether a schema accepts a value; fails for a keyword that this does not know."""
    known = {"$schema", "$defs", "$ref", "title", "description", "default", "anyOf", "type"}
    known |= {"properties", "additionalProperties", "items", "prefixItems", *BOUNDS}
    assert node.keys() <= known
    if "$ref" in node:
        return accepts(definitions[node["$ref"].rpartition("/")[2]], value, definitions)
    if "anyOf" in node:
        return any(accepts(x, value, definitions) for x in node["anyOf"])
    if not isinstance(value, TYPES[node["type"]]) or isinstance(value, bool) != (
        node["type"] == "boolean"
    ):
        return False
    if not all(test(value, node[name]) for name, test in BOUNDS.items() if name in node):
        return False
    if node["type"] == "array":
        items = node.get("prefixItems") or [node["items"]] * len(value)
        return all(accepts(x, y, definitions) for x, y in zip(items, value, strict=True))
    if node["type"] == "object":
        assert node["additionalProperties"] is False
        inner = node["properties"]
        return value.keys() <= inner.keys() and all(
            accepts(inner[key], x, definitions) for key, x in value.items()
        )
    return True


def valid(values):
    schema = uptrain.schema()
    return accepts(schema, values, schema["$defs"])


def test_the_file_is_up_to_date(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["uptrain", "--schema"])
    written = json.loads((RECIPES / "schema.json").read_text(encoding="utf-8"))
    printed = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    assert written == printed, "write it again: supra uptrain --schema > recipes/schema.json"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipes_name_the_schema_and_fit_it(path):
    first, *_ = path.read_text(encoding="utf-8").splitlines()
    name = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / name).resolve() == RECIPES / "schema.json"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    whole = values.get("budget", {}).get("teacher_tokens")
    if whole is not None:  # 2.0e+12 is a whole number to JSON schema
        values["budget"]["teacher_tokens"] = int(whole)
    assert valid(values)


@pytest.mark.parametrize(
    "values",
    [
        {"tune": {"optimizer": {"lrr": 1.0}}},
        {"tune": {"optimizer": {"lr": -1.0}}},
        {"tune": {"optimizer": {"betas": [0.9]}}},
        {"tune": {"schedule": {"kind": "linear"}}},
        {"batch": {"size": 2.5}},
        {"batch": {"size": True}},
        {"lora": {"targets": [1]}},
        {"data": 7},
        {"data": {"path": 7}},
    ],
    ids=str,
)
def test_mistakes_do_not_fit_the_schema(values):
    assert not valid(values)


def test_every_setting_has_a_meaning_and_stands_in_the_help():
    known, lines = list(keys(tree(UptrainConfig))), uptrain.outline().splitlines()
    shown = {line.split()[0].rstrip(":") for line in lines if line[:8].strip()}
    for key in known:
        meaning = node_at(tree(UptrainConfig), key.split("."))["description"]
        assert meaning[0].isupper() or meaning.startswith("bf16"), key
        assert meaning.endswith("."), key
        assert key.rpartition(".")[2] in shown, key
