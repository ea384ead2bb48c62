"""A tokenizer whose chat template always gets the same further arguments (thinking modes, tools, documents)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..chat import get_tokenizer


class WithTemplateArguments:
    """A tokenizer, but `apply_chat_template` adds `arguments`, e.g. `{"enable_thinking": False}` or `{"tools": […]}`.

    Args:
        processing_class: A tokenizer, or a processor with one.
        arguments: Passed to the template.
    """

    def __init__(self, processing_class: Any, arguments: Mapping[str, Any]) -> None:
        self._wrapped = get_tokenizer(processing_class)
        self._arguments = dict(arguments)

    def __getattr__(self, name: str) -> Any:
        if name in ("_wrapped", "tokenizer"):
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._wrapped)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return self._wrapped.apply_chat_template(conversation, **{**self._arguments, **options})


def parse_template_arguments(
    arguments: Mapping[str, Any] | str | None, *, name: str = "chat_template_kwargs"
) -> dict[str, Any]:
    """Arguments given as a mapping or as JSON, `name` of a setting.

    Raises:
        ValueError: the text is not a JSON object.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` is not JSON ({error}): {arguments!r}.") from None
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"`{name}` must be a mapping (a JSON object), got {arguments!r}.")
    return dict(arguments or {})
