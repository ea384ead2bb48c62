"""How texts and conversations become token ids: by the tokenizer's own chat template, cut where the context ends.

A document in context is a system message in front of the conversation, or the beginning of its first user message in
templates without a system role. Everything behind it (the *turns*) has the same ids whether a document, a cartridge or
nothing stands in front, so teacher and student are compared on the same ids. Where it is nothing, preamble and turns
are together what `apply_chat_template` gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .chat_layout import ChatLayout, Message, find_layout, render

# Beginnings of a message that tokenizers join with a space in front of them, or do not.
_BEGINNINGS = ("What", "7", "(", "“", "é", "海")


def get_tokenizer(processing_class: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def has_chat_template(processing_class: Any) -> bool:
    return bool(getattr(get_tokenizer(processing_class), "chat_template", None))


def encode_context(processing_class: Any, text: str, *, chat_template: bool = True) -> list[int]:
    """Token ids of `text` as the context in front of a conversation: a system message (or, in templates without one,
    the beginning of the first user message, up to where the question begins); the plain text with the tokenizer's own
    special tokens where `chat_template` is false or the tokenizer has none.

    Raises:
        ValueError: `text` is empty.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError("`text` is empty: pass the text of the corpus.")
    tokenizer = get_tokenizer(processing_class)
    if not (chat_template and has_chat_template(tokenizer)):
        return tokenizer(text)["input_ids"]
    return _encode(tokenizer, find_layout(tokenizer).render_context(tokenizer, text.strip()))


def encode_turns(
    processing_class: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of the turns of a conversation, which begins with a user message, as they stand behind a context made
    by `encode_context`, and behind `encode_preamble` where there is none.

    Raises:
        ValueError: the tokenizer has no chat template, or the conversation begins with no user message.
    """
    tokenizer, layout = _get_layout(processing_class)
    whole = _render_whole(tokenizer, layout, messages, add_generation_prompt=add_generation_prompt)
    ids, preamble = _encode(tokenizer, whole), _encode_preamble(tokenizer, layout)
    if ids[: len(preamble)] == preamble:
        return ids[len(preamble) :]
    return _encode(tokenizer, whole[len(layout.preamble) :])


def render_turns(processing_class: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """The text that `encode_turns` gives the ids of (up to a space in front).

    Raises:
        ValueError: as `encode_turns`.
    """
    tokenizer, layout = _get_layout(processing_class)
    whole = _render_whole(tokenizer, layout, messages, add_generation_prompt=add_generation_prompt)
    return whole[len(layout.preamble) :]


def encode_preamble(processing_class: Any) -> list[int]:
    """What the chat template puts in front of the turns when no system message is given (a start token, a default
    system prompt, the opening of the first user message where a context would be a part of it, or nothing): with a
    cartridge loaded, users send this in front of their turns.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    return _encode_preamble(*_get_layout(processing_class))


def _get_layout(processing_class: Any) -> tuple[Any, ChatLayout]:
    tokenizer = get_tokenizer(processing_class)
    if not has_chat_template(tokenizer):
        raise ValueError(
            "`processing_class` has no chat template: pass an instruct model's tokenizer, or set "
            "`tokenizer.chat_template`."
        )
    return tokenizer, find_layout(tokenizer)


def _render_whole(tokenizer: Any, layout: ChatLayout, messages: Sequence[Message], **options: Any) -> str:
    whole = render(tokenizer, messages, **options)
    if not whole.startswith(layout.head):
        raise ValueError(
            f"`messages` must begin with a user message, which the chat template opens with {layout.head!r}; they "
            f"render as {whole[: len(layout.head) + 40]!r}."
        )
    return whole


def _encode_preamble(tokenizer: Any, layout: ChatLayout) -> list[int]:
    """The tokens of the preamble that are the same whatever follows: the space of "[INST] What" is often a part of the
    token behind it, and so belongs to the turns."""
    if not layout.preamble:
        return []
    encoded = [_encode(tokenizer, layout.head + beginning) for beginning in _BEGINNINGS]
    columns = zip(_encode(tokenizer, layout.preamble), *encoded, strict=False)
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]


def _encode(tokenizer: Any, rendered: str) -> list[int]:
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]
