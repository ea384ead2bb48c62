"""The PEFT tuner for cartridges."""

from .config import CartridgeConfig
from .layer import CartridgeLayer
from .model import CartridgeModel

__all__ = ["CartridgeConfig", "CartridgeLayer", "CartridgeModel"]
