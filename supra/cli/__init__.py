"""The command `supra`."""

from supra.cli.app import main

__all__ = ["main"]
