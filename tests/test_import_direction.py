"""Who may import whom: commands and recipes at the top, kernels at the bottom, and no circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WATCHED = {"torch", "triton", "transformers", "accelerate", "peft", "datasets", "safetensors"}
OURS = {"supra", "recipes", "tests", "kernels"}  # a bare `import kernels` is always an error

# Rooms and modules, the top ones first. A file imports from its own line and from those below.
LEVELS = [
    ["recipes"],
    ["supra.__main__", "supra.uptrain.__main__"],
    ["supra.cli"],
    ["supra.bench.gpu"],
    ["supra.bench.train"],
    ["supra.planning"],
    ["supra.uptrain", "supra.bench", "supra.testing"],
    ["supra.long_context"],
    ["supra.evaluate.ablate", "supra.evaluate.suite"],
    ["supra.evaluate", "supra.evaluate.tasks"],
    ["supra.conversion", "supra.serving", "supra.export"],
    ["supra", "supra.configuration", "supra.modeling", "supra.states"],
    ["supra.losses", "supra.model"],
    ["supra.data", "supra.checkpoint"],
    ["supra.mixers"],
    ["supra.parallel"],
    ["supra.kernels"],
    ["supra.settings"],
    ["supra.errors"],
]
# rooms in a room, on another line than the room around them
NESTED = {
    "supra.evaluate.ablate",
    "supra.evaluate.suite",
    "supra.evaluate.tasks",
    "supra.bench.gpu",
    "supra.bench.train",
}
# other people's packages, for each room or file; the longest path that fits counts
PACKAGES = {
    "recipes": {"torch"},
    "kernels": {"torch", "triton"},
    "supra": {"torch", "transformers", "safetensors"},
    "supra/__init__.py": set(),
    "supra/errors.py": set(),
    "supra/settings": set(),
    "supra/parallel": {"torch"},
    "supra/mixers": {"torch"},
    "supra/checkpoint/files.py": {"safetensors"},
    "supra/checkpoint/untrusted.py": set(),
    "supra/data": {"torch", "transformers", "datasets"},
    "supra/model/adapters.py": {"peft"},
    "supra/model/offload.py": {"torch", "accelerate"},
    "supra/model/rows.py": {"torch"},
    "supra/bench": {"torch", "triton"},
    "supra/bench/decode.py": {"torch", "transformers"},
    "supra/bench/gpu": {"torch", "transformers"},
    "supra/bench/train": {"torch"},
    "supra/bench/rivals": {"torch", "transformers"},
    "supra/cli": {"torch"},
    "supra/planning/fake_rank.py": {"torch", "accelerate"},
    "supra/uptrain": {"torch", "transformers", "safetensors", "accelerate", "peft", "datasets"},
}


def name_of(file):
    """`supra.kernels.checks` of kernels/checks.py; a package is named by its folder."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"supra.{module}" if module.startswith("kernels") else module


FILES = {
    name_of(p): p for top in ("supra", "kernels", "recipes") for p in (ROOT / top).rglob("*.py")
}


def imported(tree):
    """The modules that a file imports anywhere in it, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import, line {node.lineno}"
            modules = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (x if x in FILES else node.module for x in modules)


def level(module):
    """The line of LEVELS. A module outside of every room fails: a new one needs a place there."""
    found = [
        (len(top), number)
        for number, tops in enumerate(LEVELS)
        for top in tops
        if module == top or (module.startswith(f"{top}.") and top != "supra")
    ]
    assert found, f"{module} has no level: give its room or file a line in LEVELS"
    return max(found)[1]


def check(module, path, source):
    """Assert that a file imports only from its level and below, and only packages of its room."""
    room = max((top for top in PACKAGES if path.startswith(top)), key=len)
    for name in imported(ast.parse(source)):
        top = name.split(".")[0]
        if top in OURS:
            assert level(name) >= level(module), f"{module} imports {name}, which stands above it"
        assert top not in WATCHED or top in PACKAGES[room], f"{module} imports {name}"


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module):
    path = FILES[module]
    check(module, path.relative_to(ROOT).as_posix(), path.read_text())


def test_there_are_no_circles():
    """Neither between files nor between rooms."""
    files, rooms = {}, {}
    for module, path in FILES.items():
        found = {x for x in imported(ast.parse(path.read_text())) if x in FILES} - {module}
        files[module] = found
        rooms.setdefault(room(module), set()).update({room(x) for x in found} - {room(module)})
    for graph in (files, rooms):
        TopologicalSorter(graph).prepare()


def room(module):
    if module.endswith(".__main__"):  # starts a command, so it stands above its folder
        return module
    parts = module.split(".")
    return ".".join(parts[: 3 if ".".join(parts[:3]) in NESTED else 2])


def test_the_guard_sees_what_it_should():
    attention = ("supra.model.attention", "supra/model/attention.py")
    for source in ("import supra.uptrain", "def f():\n    from supra.uptrain import train"):
        with pytest.raises(AssertionError, match="stands above it"):
            check(*attention, source)
    with pytest.raises(AssertionError, match=r"supra\.model\.attention imports triton"):
        check(*attention, "import triton")
    for name in ("supra.new", "supra.new_room.file", "kernels"):
        with pytest.raises(AssertionError, match="has no level"):
            level(name)
    with pytest.raises(AssertionError, match="has no level"):
        check("supra.new", "supra/new.py", "import supra.errors")


def test_supra_has_few_loose_modules():
    assert len(list((ROOT / "supra").glob("*.py"))) <= 6
