"""The bar of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm.auto import tqdm

from ..conversations.folder import Part
from .engines import Outcome


class Progress:
    """The bar of a stage: conversations, tokens per second and the share that was kept."""

    def __init__(self, plan: Sequence[Part], pending: Sequence[Part], title: str, *, shown: bool) -> None:
        self._left = {part: len(part) for part in pending}
        total = sum(map(len, plan))
        self._bar = tqdm(
            total=total, initial=total - sum(map(len, pending)), desc=title, unit=" conversations", disable=not shown
        )
        self._tokens, self._started, self._told = 0, time.perf_counter(), 0.0

    def add(self, part: Part) -> None:
        """A part is there."""
        self._bar.update(self._left.pop(part, 0))

    def answered(self, outcome: Outcome) -> None:
        if outcome.generation is not None:
            self._tokens += len(outcome.generation.token_ids)
        now = time.perf_counter()
        if now - self._told > 1 and self._tokens:
            self._told = now
            self.say(f"{self._tokens / (now - self._started):,.0f} tokens/s")

    def say(self, text: str) -> None:
        self._bar.set_postfix_str(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
