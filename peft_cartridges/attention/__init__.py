"""A whole batch behind one shared prefix: the mechanism under teacher, cartridge, synthesis and evaluation."""

from .contexts import shared_prefix
from .probe import (
    AttentionLayer,
    UnsupportedModelError,
    find_attention_layers,
    find_decoder,
    find_recurrent_layers,
    get_decoder,
)

__all__ = [
    "AttentionLayer",
    "UnsupportedModelError",
    "find_attention_layers",
    "find_decoder",
    "find_recurrent_layers",
    "get_decoder",
    "shared_prefix",
]
