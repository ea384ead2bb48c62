"""Attention of a whole batch to one shared prefix: the mechanism under teacher, cartridge, synthesis and evaluation."""

from .context import shared_prefix
from .interface import LayerPrefix
from .layers import AttentionLayer, UnsupportedModelError, find_attention_layers, find_decoder

__all__ = [
    "AttentionLayer",
    "LayerPrefix",
    "UnsupportedModelError",
    "find_attention_layers",
    "find_decoder",
    "shared_prefix",
]
