"""supra turns pretrained transformers into recurrent networks with a fixed-size state."""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():  # a checkout: supra.kernels is the top-level kernels/
    __path__.append(str(_here.parent))

from supra.model.registration import register_with_transformers  # noqa: E402

register_with_transformers()
