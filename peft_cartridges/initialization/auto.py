"""The best initialization that a model allows."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..attention.probe import UnsupportedModelError
from ..kv_prefix import KVPrefix
from .first_tokens import first_tokens
from .most_attended import most_attended


def auto(model: nn.Module, processing_class: Any, text: str, *, num_tokens: int, chat_template: bool) -> KVPrefix:
    """`most_attended`, or with a warning `first_tokens` where keys cannot be moved (learned positions) or not all layers
    have attention."""
    options: dict[str, Any] = {"num_tokens": num_tokens, "chat_template": chat_template}
    try:
        return most_attended(model, processing_class, text, **options)
    except UnsupportedModelError as reason:
        warnings.warn(f"Initialization from the first tokens of the text: {reason}", stacklevel=2)
        return first_tokens(model, processing_class, text, **options)
