"""Who may import whom: recipes and commands at the top, kernels at the bottom, one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WATCHED = {"torch", "triton", "transformers", "accelerate", "peft", "datasets", "safetensors"}
OURS = {"supra", "recipes", "tests", "kernels"}  # a bare `import kernels` is always an error
MODEL = {"torch", "transformers", "safetensors", "supra"}

# path -> what files below it may import; the longest path that fits counts
LAYERS = {
    "kernels": {"torch", "triton", "supra.kernels"},
    "supra/errors.py": set(),
    "supra/adapters.py": {"peft", "supra.errors"},
    "supra/files.py": {"safetensors", "supra.errors"},
    "supra/mixers": {"torch", "supra.kernels", "supra.mixers", "supra.parallel", "supra.errors"},
    "supra/parallel": {"torch", "supra.kernels", "supra.parallel", "supra.errors"},
    "supra/cache.py": {"torch", "transformers", "supra.mixers", "supra.errors"},
    "supra/rows.py": {"torch", "supra.errors"},
    "supra/untrusted.py": {"supra.errors"},
    "supra/config_rules.py": {"torch", "transformers", "supra.errors", "supra.mixers"},
    "supra/configuration.py": {
        *("torch", "transformers", "supra.errors", "supra.untrusted", "supra.modeling"),
        "supra.config_rules",
    },
    "supra": MODEL,
    "supra/bench": {
        *("torch", "triton", "supra.bench", "supra.kernels", "supra.errors", "supra.strict_json")
    },
    "supra/bench/command.py": {"supra.arguments", "supra.bench", "supra.checkpoints"},
    "supra/bench/parallel.py": {
        *("torch", "supra.bench", "supra.parallel", "supra.errors", "supra.strict_json")
    },
    "supra/bench/rivals.py": {"torch", "transformers", "supra.kernels"},
    "supra/uptrain": MODEL | {"accelerate", "peft", "datasets"},
    "supra/text.py": {"torch", "datasets", "supra.errors"},
    "recipes": {"torch", "supra"},
}
# top first: a file may import from its own level and from those below
LEVELS = [
    ["supra.cli"],
    ["supra.uptrain", "supra.convert", "supra.inspection", "supra.generation", "supra.bench"],
    ["supra.long_context"],
    ["supra.evaluate"],
    ["supra.checkpoints", "supra.packing", "supra.losses", "supra.text", "supra.calibrate"],
    ["supra.modeling", "supra.configuration", "supra.cache"],
    ["supra.config_rules", "supra.rows"],
    ["supra.mixers"],
    ["supra.parallel"],
    ["supra.kernels"],
]


def imported(file):
    """(name, inside a function) of every absolute import."""
    tree = ast.parse(file.read_text())
    late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import, line {node.lineno}"
            yield node.module, id(node) in late


def files():
    return [p for top in ("supra", "kernels", "recipes") for p in (ROOT / top).rglob("*.py")]


def layer(file):
    path = file.relative_to(ROOT).as_posix()
    return max((top for top in LAYERS if path.startswith(top)), key=len)


def level(module):
    names = [
        i for i, group in enumerate(LEVELS) for top in group if (module + ".").startswith(top + ".")
    ]
    return names[0] if names else None


def within(name, allowed):
    return any((name + ".").startswith(top + ".") for top in allowed)


@pytest.mark.parametrize("file", files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_down(file):
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    module = module.removesuffix(".__init__")
    module = f"supra.{module}" if module.startswith("kernels") else module
    for name, late in imported(file):
        if name.split(".")[0] in WATCHED | OURS:
            assert within(name, LAYERS[layer(file)]), f"{module} imports {name}"
        upward = level(name) is not None and level(module) is not None
        if upward and not (late and module == "supra.configuration"):
            assert level(name) >= level(module), f"{module} imports {name}, which stands above it"
