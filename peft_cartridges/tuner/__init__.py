"""The PEFT tuner for cartridges. Importing this registers it with PEFT."""

from .config import CartridgeConfig
from .layer import CartridgeLayer
from .model import CartridgeModel
from .registration import register

register()

__all__ = ["CartridgeConfig", "CartridgeLayer", "CartridgeModel"]
