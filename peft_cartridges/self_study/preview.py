"""Conversations as people read them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

_WIDTH = 100


def format_conversation(row: Mapping[str, Any], number: int | None = None) -> str:
    """A row of a self-study data set: where it is from, and who says what."""
    title = f"{'' if number is None else f'{number}. '}{row['seed_type']} · {row['chunk_id']}"
    if row.get("usefulness") is not None:
        title += f" · {row['usefulness']:.2f} nats a token over no chunk"
    lines = [title, "─" * min(len(title), _WIDTH)]
    for message in row["messages"]:
        name = {"user": "A", "assistant": "B"}.get(message["role"], message["role"])
        for first, paragraph in enumerate(message["content"].splitlines() or [""]):
            mark = f"{name}: " if first == 0 else "   "
            lines += textwrap.wrap(paragraph, _WIDTH, initial_indent=mark, subsequent_indent="   ") or [mark.rstrip()]
    learned = sum(row["completion_mask"])
    return "\n".join([*lines, f"   ({learned} tokens learned of {len(row['input_ids'])})"])
