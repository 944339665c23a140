"""Converted models made known to transformers' Auto classes, without importing them for it.

transformers brings torch along, which takes seconds that `supra --help` has no use for. So what has
to be registered waits until somebody imports AutoConfig.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Now where AutoConfig is imported already, else right after it is."""
    if AUTO in sys.modules:
        import supra.configuration  # noqa: F401 (it registers itself)
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds the module AUTO as everybody would, and has it followed by supra.configuration."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == AUTO else None
        if spec is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            import supra.configuration  # noqa: F401

        spec.loader.exec_module = run_and_register
        return spec
