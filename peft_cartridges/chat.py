"""How texts and conversations become token ids: by the tokenizer's own chat template, cut where the context ends.

A document in context is a system message in front of the conversation. Everything behind it (the *turns*) is the same
whether a document, a cartridge or nothing stands in front, so teacher and student are compared on the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

_PROBE = "A context stands here."


def get_tokenizer(processing_class: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def has_chat_template(processing_class: Any) -> bool:
    return bool(getattr(get_tokenizer(processing_class), "chat_template", None))


def encode_context(processing_class: Any, text: str, *, chat_template: bool = True) -> list[int]:
    """Token ids of `text` as the context in front of a conversation: a system message (or, in templates without one,
    the beginning of the first user message); the plain text with the tokenizer's own special tokens where
    `chat_template` is false or the tokenizer has none.

    Raises:
        ValueError: `text` is empty.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError("`text` is empty: pass the text of the corpus.")
    tokenizer = get_tokenizer(processing_class)
    if not (chat_template and has_chat_template(tokenizer)):
        return tokenizer(text)["input_ids"]
    context, _ = _split(tokenizer, text.strip(), [{"role": "user", "content": "?"}])
    return tokenizer(context, add_special_tokens=False)["input_ids"]


def encode_turns(
    processing_class: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of the turns of a conversation as they stand behind a context made by `encode_context`.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    rendered = render_turns(processing_class, messages, add_generation_prompt=add_generation_prompt)
    return get_tokenizer(processing_class)(rendered, add_special_tokens=False)["input_ids"]


def render_turns(processing_class: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """The text that `encode_turns` tokenizes."""
    tokenizer = get_tokenizer(processing_class)
    if not has_chat_template(tokenizer):
        raise ValueError(
            "`processing_class` has no chat template: pass an instruct model's tokenizer, or set "
            "`tokenizer.chat_template`."
        )
    return _split(tokenizer, _PROBE, messages, add_generation_prompt=add_generation_prompt)[1]


def encode_preamble(processing_class: Any) -> list[int]:
    """What the chat template puts in front of the turns when no system message is given (a start token, a default
    system prompt, or nothing): with a cartridge loaded, users send this in front of their turns."""
    tokenizer = get_tokenizer(processing_class)
    messages = [{"role": "user", "content": "?"}]
    plain = tokenizer.apply_chat_template(messages, tokenize=False)
    turns = render_turns(tokenizer, messages)
    if not plain.endswith(turns):
        return []
    return tokenizer(plain[: -len(turns)], add_special_tokens=False)["input_ids"] if plain != turns else []


def _split(tokenizer: Any, text: str, messages: Sequence[Message], **options: Any) -> tuple[str, str]:
    """The rendered conversation about `text`, cut into (context, turns)."""

    def render(conversation: Sequence[Message], **options: Any) -> str:
        return tokenizer.apply_chat_template(list(conversation), tokenize=False, **options)

    system = {"role": "system", "content": text}
    try:
        whole = render([system, *messages], **options)
    except Exception:  # templates refuse a system role by raising their own error (Gemma 2, early Mistral)
        whole = ""
    if text not in whole:
        first, *rest = messages
        whole = render([{**first, "content": f"{text}\n\n{first['content']}"}, *rest], **options)
    else:
        try:
            context = render([system])
        except Exception:  # templates that insist on a user message (Qwen 3.5) cannot render the context alone
            context = ""
        if text in context and whole.startswith(context):
            return context, whole[len(context) :]
    cut = whole.index(text) + len(text)
    return whole[:cut], whole[cut:]
