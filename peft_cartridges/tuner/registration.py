"""Making PEFT use `CartridgeModel` for its CARTRIDGE type."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from peft import PeftModel
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
    if not hasattr(PeftModel.set_adapter, "__wrapped__"):
        PeftModel.set_adapter = _with_compositions(PeftModel.set_adapter)  # type: ignore[method-assign]


def _with_compositions(set_adapter: Any) -> Any:
    """`PeftModel.set_adapter` that also takes several names where they are cartridges. Stock PEFT takes them in the
    tuner, but not here."""

    @functools.wraps(set_adapter)
    def wrapper(self: PeftModel, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        if isinstance(adapter_name, str) or not isinstance(self.base_model, CartridgeModel):
            return set_adapter(self, adapter_name, inference_mode=inference_mode)
        names = list(adapter_name)
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"Adapter {', '.join(unknown)} not found; there are: {', '.join(self.peft_config)}.")
        self.base_model.set_adapter(names, inference_mode=inference_mode)
        self.active_adapter = names[0]  # what PEFT looks a configuration up by; the tuner knows all of them

    return wrapper
