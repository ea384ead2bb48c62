"""The progress bar of a synthesis: conversations, time left, tokens per second and the share that was kept."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm.auto import tqdm

from .chunk_study import ChunkReport


class Progress:
    """Counts chunk by chunk; what was there before the run does not count as speed.

    Args:
        total: Conversations that are wanted.
        done: Of those, how many were there already.
        shown: Whether there is a bar.
    """

    def __init__(self, total: int, done: int = 0, *, shown: bool = True) -> None:
        self.bar = tqdm(total=total, initial=done, desc="Self-study", unit="conversation", disable=not shown)
        self.made = self.kept = self.tokens = 0
        self.started = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of everything: prefill, decoding and the teacher's targets."""
        return self.tokens / max(time.perf_counter() - self.started, 1e-9)

    @property
    def acceptance(self) -> float:
        return self.kept / self.made if self.made else 1.0

    def add(self, report: ChunkReport, wanted: int) -> None:
        """A chunk is finished. Its `wanted` conversations count as done, also where fewer were kept."""
        self.made += report.made
        self.kept += report.kept
        self.tokens += report.generated_tokens
        self.bar.set_postfix_str(f"{self.tokens_per_second:,.0f} tokens/s, {self.acceptance:.0%} kept", refresh=False)
        self.bar.update(wanted)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
