"""What a server calls a token, as the tokenizer's id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...chat import get_tokenizer

_ID = "token_id:"


class ServerTokens:
    """Looks up tokens that come as `token_id:123`, as the vocabulary writes them, or as their text.

    A text that stands for several tokens (single bytes of a character all read the same) is known as none.
    """

    def __init__(self, processing_class: Any) -> None:
        self.tokenizer = get_tokenizer(processing_class)
        self._texts: dict[str, int | None] | None = None

    def look_up(self, token: str) -> int | None:
        """The id of a server's token; `None` if it cannot be told."""
        if token.startswith(_ID):
            number = token[len(_ID) :]
            return int(number) if number.isdigit() else None
        if self._texts is None:
            self._texts = self._make_texts()
        return self._texts.get(token)

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _make_texts(self) -> dict[str, int | None]:
        vocabulary = self.tokenizer.get_vocab()
        found: dict[str, int | None] = {}
        for token, index in vocabulary.items():
            text = self.tokenizer.convert_tokens_to_string([token])
            found[text] = None if text in found else index
        # Written as in the vocabulary, a token is never ambiguous.
        return {**{token: index for token, index in vocabulary.items() if token not in found}, **found}
