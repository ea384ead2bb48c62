"""Where a chat template puts a context, and where the turns begin behind it: found out by rendering short messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]

_CONTEXT = "A context stands here."
_FIRST = "The first question"
_CONVERSATION = (
    {"role": "user", "content": _FIRST},
    {"role": "assistant", "content": "The first answer"},
    {"role": "user", "content": "The second question"},
)


# Gives a conversation as the chat template writes it.
Render = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class ChatLayout:
    """How a chat template lays out a context and the turns behind it.

    Args:
        has_system_role: Whether a context is a system message in front of the conversation; otherwise it is the
            beginning of the first user message, with an empty line behind it.
        head: All that stands in front of the first user message's text where there is no context.
        opening: The end of `head` that belongs to the turns: the first user message's role where the system message is
            a block of its own, and nothing where the context is a part of the first user message.
    """

    has_system_role: bool
    head: str
    opening: str

    @property
    def preamble(self) -> str:
        """What stands in front of the turns where there is no context."""
        return self.head.removesuffix(self.opening)

    def render_context(self, render: Render, text: str) -> str:
        """What stands in front of the turns where `text` is the context."""
        (first, *_) = _CONVERSATION
        whole = render(_put_context(text, [first], as_system=self.has_system_role))
        return whole[: whole.rindex(_FIRST)].removesuffix(self.opening)


def find_layout(render: Render) -> ChatLayout:
    """The layout of the chat template that `render` writes."""
    head, _, rest = render(_CONVERSATION).partition(_FIRST)
    try:
        with_system = render(_put_context(_CONTEXT, _CONVERSATION, as_system=True))
    except Exception:  # templates refuse a system role by raising their own error (Gemma 2, early Mistral)
        with_system = ""
    before, _, behind = with_system.partition(_FIRST)
    # Some templates leave system messages out, others put them into the last user message (Mistral 7B v0.3), where
    # the turns before it would stand in front of the context.
    if _CONTEXT not in before or behind != rest:
        return ChatLayout(False, head, "")
    try:
        context = render([{"role": "system", "content": _CONTEXT}])
    except Exception:  # templates that insist on a user message (Qwen 3.5) cannot render the context alone
        context = before.removesuffix(head)
    opening = before[len(context) :] if _CONTEXT in context and before.startswith(context) else ""
    return ChatLayout(True, head, opening if head.endswith(opening) else "")


def get_tokenizer(processing_class: Any) -> Any:
    """The tokenizer of a processor or of a `ChatCodec`, or the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def has_chat_template(processing_class: Any) -> bool:
    return bool(getattr(get_tokenizer(processing_class), "chat_template", None))


def _put_context(text: str, conversation: Sequence[Message], *, as_system: bool) -> list[Message]:
    if as_system:
        return [{"role": "system", "content": text}, *conversation]
    first, *rest = conversation
    return [{**first, "content": f"{text}\n\n{first['content']}"}, *rest]
