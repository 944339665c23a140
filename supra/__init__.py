"""supra turns pretrained transformers into recurrent networks with a fixed-size state."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

__version__ = "0.2.0"

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    # A checkout: kernels/ lies beside supra/. This makes that one folder importable, no other.
    _spec = ModuleSpec("supra.kernels", None, is_package=True)
    _spec.submodule_search_locations.append(str(_here.parent / "kernels"))
    kernels = sys.modules["supra.kernels"] = module_from_spec(_spec)

from supra.model.registration import register_with_transformers  # noqa: E402

register_with_transformers()


def __getattr__(name: str):
    """Import `accelerate` only when it is used: it imports torch."""
    if name == "accelerate":
        from supra.model.native import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
