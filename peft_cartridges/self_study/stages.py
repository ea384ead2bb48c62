"""A stage of a set: its parts are made once, by whichever of the processes that work in the folder claims them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..conversations.folder import ConversationFolder, Part
from .dispatch import Dispatcher
from .engines import Engine
from .progress import Progress

# Seconds between looks at parts that somebody else is making.
_LOOK = 0.5


@dataclass(frozen=True)
class Stage:
    """Parts that are to be there.

    Args:
        folder: Where.
        name: Of the stage, as the folder knows it.
        plan: The parts.
        title: Of the bar.
        shown: Whether there is a bar.
    """

    folder: ConversationFolder
    name: str
    plan: Sequence[Part]
    title: str
    shown: bool

    def run_jobs(self, engines: Sequence[Engine], make_job: Callable[[Part], Any], keep: Callable[[Any], None]) -> None:
        """Makes the parts that are not there by jobs on engines.

        Args:
            engines: What answers.
            make_job: The job of a part; see `Job`.
            keep: Writes the part of a finished job.
        """

        def make(pending: list[Part], progress: Progress) -> None:
            with contextlib.ExitStack() as claims:
                held: dict[Any, contextlib.ExitStack] = {}

                def jobs() -> Iterator[Any]:
                    for part in pending:
                        claim = claims.enter_context(contextlib.ExitStack())
                        if claim.enter_context(self.folder.claimed(self.name, part)):
                            job = make_job(part)
                            held[job] = claim
                            yield job
                        else:
                            claim.close()

                def finished(job: Any) -> None:
                    keep(job)
                    held.pop(job).close()
                    progress.add(job.part)

                Dispatcher(engines).run(jobs(), finished, progress.answered)

        self._complete(make)

    def make_each(self, make: Callable[[Part], None]) -> None:
        """Makes the parts that are not there one after another."""

        def make_all(pending: list[Part], progress: Progress) -> None:
            for part in pending:
                with self.folder.claimed(self.name, part) as mine:
                    if mine:
                        make(part)
                        progress.add(part)

        self._complete(make_all)

    def _complete(self, make: Callable[[list[Part], Progress], None]) -> None:
        """Has what is not there made, and waits for what somebody else is making."""
        pending = self._missing(self.plan)
        with Progress(self.plan, pending, self.title, shown=self.shown and bool(pending)) as progress:
            while pending:
                make(pending, progress)
                before, pending = pending, self._missing(pending)
                for part in set(before) - set(pending):
                    progress.add(part)
                if pending:
                    progress.say(f"{len(pending)} parts are being made by another process")
                    time.sleep(_LOOK)

    def _missing(self, parts: Sequence[Part]) -> list[Part]:
        return [part for part in parts if not self.folder.has(self.name, part)]
