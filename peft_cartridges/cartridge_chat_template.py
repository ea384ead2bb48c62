"""The chat template for conversations behind a cartridge: nothing in front of the turns, as behind a document.

A document stands in the system message. Where there is none, many templates put a default system prompt (or a date, or a
start token) in front of the first user message. Behind a cartridge that is a second system message in the middle of a
context, which a model meets nowhere else: SmolLM2 with a whole text as its cartridge then answers half as well as with
the text in its system message (`docs/training.md`).
"""

from __future__ import annotations

import copy
import json
from typing import Any

from .chat import get_tokenizer, has_chat_template, render_turns

# Words that no template has, so that its place in what is rendered is found.
_MARK = "[[the cartridge stands here]]"
_QUESTION = {"role": "user", "content": "?"}


def cartridge_chat_template(processing_class: Any) -> str:
    """A Jinja chat template that renders a conversation without a system message as its turns alone, and one with a
    system message as the tokenizer's own template does.

    Args:
        processing_class: Tokenizer or processor of the base model.

    Returns:
        The template, to be set as `tokenizer.chat_template`. The tokenizer's own one, if it puts nothing in front.

    Raises:
        ValueError: there is no chat template, or it cannot be wrapped (what it puts in front of a conversation cannot
            be told from the turns).
    """
    tokenizer = get_tokenizer(processing_class)
    if not has_chat_template(tokenizer):
        raise ValueError("`processing_class` has no chat template: pass an instruct model's tokenizer.")
    own = tokenizer.get_chat_template()
    turns = render_turns(tokenizer, [_QUESTION])
    if tokenizer.apply_chat_template([_QUESTION], tokenize=False) == turns:
        return own
    whole = _render(tokenizer, [{"role": "system", "content": _MARK}, _QUESTION])
    if whole is not None and _MARK in whole and whole.endswith(turns):
        in_front = "[{'role': 'system', 'content': MARK}] + messages"
        cut = whole[whole.index(_MARK) : -len(turns)]
    else:  # no system role: a document is the beginning of the first user message
        in_front = "[{'role': 'user', 'content': MARK ~ messages[0]['content']}] + messages[1:]"
        cut = f"{_MARK}\n\n" if turns.startswith("?") else _MARK
        in_front = in_front.replace("MARK ~", "CUT ~")
    template = (
        "{%- macro cartridge_render(messages) -%}" + own + "{%- endmacro -%}"
        "{%- if messages[0]['role'] == 'system' -%}{{ cartridge_render(messages) }}"
        "{%- else -%}{{ cartridge_render(" + in_front + ").split(CUT, 1)[1] }}{%- endif -%}"
    )
    template = template.replace("CUT", json.dumps(cut)).replace("MARK", json.dumps(_MARK))
    for messages in ([_QUESTION], [_QUESTION, {"role": "assistant", "content": "!"}, _QUESTION]):
        for options in ({}, {"add_generation_prompt": True}):
            rendered = _render(tokenizer, messages, chat_template=template, **options)
            if rendered != render_turns(tokenizer, messages, **options):
                raise ValueError(
                    "The chat template of `processing_class` cannot be wrapped: set `default_system_prompt=True`, so "
                    "that the cartridge is trained behind what the template puts in front of a conversation."
                )
    return template


def with_cartridge_chat_template(processing_class: Any) -> Any:
    """A copy of the tokenizer (or processor) whose chat template is `cartridge_chat_template`."""
    changed = copy.deepcopy(processing_class)
    template = cartridge_chat_template(processing_class)
    for holder in {id(part): part for part in (changed, get_tokenizer(changed))}.values():
        if has_chat_template(holder) or getattr(holder, "chat_template", None):
            holder.chat_template = template
    return changed


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str | None:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception:  # templates refuse roles by raising an error of their own
        return None
