"""`initialize_cartridge`: gives an adapter its first keys and values."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel

from ..kv_prefix import KVPrefix
from ..tuner.config import CartridgeConfig
from ..tuner.model import CartridgeModel
from .registry import get_strategy


def initialize_cartridge(
    model: PeftModel,
    processing_class: Any = None,
    *,
    text: str | None = None,
    prefix: KVPrefix | None = None,
    strategy: str = "auto",
    adapter_name: str | None = None,
    chat_template: bool = True,
) -> KVPrefix:
    """Fills a cartridge from a text, or from a prefix that is there already.

    A cartridge that `get_peft_model` has just made holds noise; training from a part of the text itself is faster and
    ends better (arXiv 2506.06266, ablation of initializations). Which part makes more of a difference than anything
    else: see `docs/training.md`.

    Args:
        model: The PEFT model with the cartridge.
        processing_class: Tokenizer or processor of the base model; needed with `text`.
        text: The corpus, or a representative part of it.
        prefix: Instead of `text`: keys and values to take as they are.
        strategy: How `num_tokens` tokens are made of the text. `most_attended`: each head's own, by the attention that
            they receive when the model recites the text. `first_tokens`: the first ones, the paper's. `auto`: the
            former where the model allows it, else the latter. `list_strategies()` has those that you registered too.
        adapter_name: Which adapter; the active one by default.
        chat_template: Whether the text stands in a system message, as in `KVPrefix.from_text`.

    Returns:
        The prefix that the cartridge now holds.

    Raises:
        ValueError: neither or both of `text` and `prefix` are given, the text is empty or shorter than the cartridge,
            or the adapter is no cartridge of this package.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, CartridgeModel):
        raise ValueError(
            f"`model` is a {type(model).__name__} without a cartridge: make one with "
            "`get_peft_model(model, peft_cartridges.CartridgeConfig(num_tokens=…))`."
        )
    if (text is None) == (prefix is None):
        raise ValueError("Give one of `text` (with `processing_class`) and `prefix`.")
    name = tuner.active_adapters[0] if adapter_name is None else adapter_name
    if name not in tuner.peft_config:
        raise ValueError(f"`adapter_name={name!r}` is not loaded; there are: {', '.join(tuner.peft_config)}.")
    if prefix is None:
        assert text is not None
        if processing_class is None:
            raise ValueError("`processing_class` is missing: pass the tokenizer of the base model with `text`.")
        with model.disable_adapter():
            prefix = get_strategy(strategy)(
                model.get_base_model(),
                processing_class,
                text,
                num_tokens=cast(CartridgeConfig, tuner.peft_config[name]).num_tokens or 0,
                chat_template=chat_template,
            )
    tuner.set_kv_prefix(prefix, name)
    return prefix
