"""The `cartridges` command."""

from .main import main

__all__ = ["main"]
