"""Making PEFT use `CartridgeModel` for its CARTRIDGE type."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from .config import CartridgeConfig
from .model import CartridgeModel


def register() -> None:
    """Adapters of type CARTRIDGE that are loaded from files become ours; configuration objects decide for themselves:
    a stock `peft.CartridgeConfig` still gives stock PEFT's behaviour (see `CartridgeModel.__new__`).

    `peft.utils.register_peft_method` refuses a name that exists, so the mappings it fills are filled here.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CARTRIDGE] = CartridgeConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CARTRIDGE] = CartridgeModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.CARTRIDGE] = CartridgeModel.prefix
