"""Converted models for other runtimes."""

from supra.export.decoding_step import DecodingStep

__all__ = ["DecodingStep"]
