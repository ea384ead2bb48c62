"""The model that is trained: loaded by name if need be, with a cartridge."""

from __future__ import annotations

import json
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..tuner import CartridgeConfig, CartridgeModel
from .self_study_config import SelfStudyConfig


def prepare_model(
    model: Any, args: SelfStudyConfig, processing_class: Any, peft_config: CartridgeConfig | None
) -> tuple[PeftModel, Any]:
    """The model with a cartridge, on its device, and its tokenizer or processor.

    Raises:
        ValueError: the tokenizer is missing, or the model has no cartridge and none is configured, or has one and
            another is configured.
    """
    if isinstance(model, str):
        options = args.model_init_kwargs or {}
        options = json.loads(options) if isinstance(options, str) else options
        processing_class = processing_class or AutoTokenizer.from_pretrained(model)
        model = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "auto", **options})
    if processing_class is None:
        raise ValueError("`processing_class` is missing: pass the tokenizer of the model.")
    set_seed(args.seed)  # a cartridge that is not initialized from a text is random
    model = _with_cartridge(model, peft_config)
    # Trainer moves the model to its device later than the synthesis needs it there.
    if getattr(model, "hf_device_map", None) is None:
        model.to(args.device)
    return model, processing_class


def _with_cartridge(model: Any, peft_config: CartridgeConfig | None) -> PeftModel:
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, CartridgeModel):
            raise ValueError(
                f"`model` is a PEFT model without a cartridge (its tuner is a {type(model.base_model).__name__}): pass "
                "the base model and `peft_config=CartridgeConfig(num_tokens=…)`."
            )
        if peft_config is not None:
            raise ValueError("`model` has a cartridge already: leave `peft_config` out, or pass the base model.")
        return model
    if peft_config is None:
        raise ValueError("`peft_config` is missing: pass `CartridgeConfig(num_tokens=…)`, or a model with a cartridge.")
    return get_peft_model(model, peft_config)
