"""How texts and conversations become token ids and text again: all that the package knows of chat templates."""

from .cartridge_template import cartridge_chat_template, with_cartridge_chat_template
from .codec import ChatCodec, Exchange
from .layout import Message, get_tokenizer, has_chat_template

__all__ = [
    "ChatCodec",
    "Exchange",
    "Message",
    "cartridge_chat_template",
    "get_tokenizer",
    "has_chat_template",
    "with_cartridge_chat_template",
]
