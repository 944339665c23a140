"""Models of transformers that are recurrent themselves, such as Mamba-2, in the words of mixers."""

from supra.model.native.adapter import accelerate

__all__ = ["accelerate"]
