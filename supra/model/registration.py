"""Registers converted models with transformers' Auto classes, without importing transformers.

transformers imports torch, which takes seconds, and `supra --help` needs neither. So registration
waits until something imports AutoConfig.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Register now if AutoConfig is already imported, else right after its import."""
    if AUTO in sys.modules:
        import supra.model.auto  # noqa: F401 (it registers itself)
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds the module AUTO in the usual way and imports supra.model.auto right after it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == AUTO else None
        if spec is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            import supra.model.auto  # noqa: F401

        spec.loader.exec_module = run_and_register
        return spec
