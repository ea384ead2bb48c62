"""The chat template for conversations behind a cartridge: nothing in front of the turns, as behind a document.

A document stands in the system message. Where there is none, many templates put a default system prompt (or a date, or a
start token) in front of the first user message. Behind a cartridge that is a second beginning in the middle of a
context, which a model meets nowhere else.
"""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

from .codec import ChatCodec
from .layout import get_tokenizer, has_chat_template

# Words that no template has, so that their place in what is rendered is found.
_MARK = "[[the cartridge stands here]]"
_QUESTION = {"role": "user", "content": "?"}
_CONVERSATIONS: list[list[dict[str, str]]] = [
    [_QUESTION],
    [_QUESTION, {"role": "assistant", "content": "!"}, _QUESTION],
]


def cartridge_chat_template(processing_class: Any) -> str:
    """A Jinja chat template that renders a conversation without a system message as its turns alone, and one with a
    system message as the tokenizer's own template does.

    Args:
        processing_class: Tokenizer or processor of the base model.

    Returns:
        The template, to be set as `tokenizer.chat_template`. The tokenizer's own where it puts nothing in front of the
        turns, or where a system message is no block of its own but a part of the first user message (Gemma, Mistral,
        Llama 2), whose opening the turns then cannot do without.

    Raises:
        ValueError: there is no chat template, or it cannot be wrapped.
    """
    tokenizer = get_tokenizer(processing_class)
    codec = ChatCodec(None, tokenizer)
    if not codec.preamble or not codec.layout.opening:
        return tokenizer.get_chat_template()
    context = codec.layout.render_context(codec.render, _MARK)
    cut = json.dumps(context[context.index(_MARK) :])
    placed = f"[{{'role': 'system', 'content': {json.dumps(_MARK)}}}] + messages"
    template = (
        "{%- macro own(messages) -%}" + tokenizer.get_chat_template() + "{%- endmacro -%}"
        "{%- if messages[0]['role'] == 'system' -%}{{ own(messages) }}"
        "{%- else -%}{{ own(" + placed + ").split(" + cut + ", 1)[1] }}{%- endif -%}"
    )
    codecs = [codec, ChatCodec(None, tokenizer, thoughts="drop")]  # for every mode of thinking
    for codec, messages in itertools.product(codecs, _CONVERSATIONS):
        for options in ({}, {"add_generation_prompt": True}):
            rendered = codec.render(messages, chat_template=template, **options)
            if rendered != codec.render_turns(messages, **options):
                raise ValueError(
                    "The chat template of `processing_class` cannot be wrapped: set `default_system_prompt=True`, so "
                    "that the cartridge is trained behind what the template puts in front of a conversation."
                )
    return template


def with_cartridge_chat_template(processing_class: Any) -> Any:
    """A copy of the tokenizer (or processor) whose chat template is `cartridge_chat_template`; the same object where
    it has no chat template, or needs no other."""
    if not has_chat_template(processing_class):
        return processing_class
    template = cartridge_chat_template(processing_class)
    if template == get_tokenizer(processing_class).get_chat_template():
        return processing_class
    changed = copy.deepcopy(processing_class)
    for holder in (changed, get_tokenizer(changed)):
        if getattr(holder, "chat_template", None):
            holder.chat_template = template
    return changed
