"""Dispatching requests to engines: many jobs under way, no barriers, and work goes to whoever is free."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .engines import Engine, EngineError, Outcome, Request

# A request that takes this many times as long as others do, and at least so many seconds, is put to another engine too.
_SLOW, _PATIENCE = 4.0, 10.0
# Seconds after which it is looked whether anything is to be done, though no engine has said so.
_LOOK = 0.25


class Job(Protocol):
    """Requests that belong together: a part's conversations, or their scoring."""

    @property
    def finished(self) -> bool: ...

    def begin(self) -> list[Request]:
        """The first requests."""
        ...

    def receive(self, outcome: Outcome) -> list[Request]:
        """Further requests, now that one was answered or refused."""
        ...


@dataclass(eq=False)
class _Flight:
    """A request that is under way."""

    job: Job
    since: float
    engines: set[Engine] = field(default_factory=set)


class Dispatcher:
    """Runs jobs on engines.

    Args:
        engines: One or many.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self._waiting: OrderedDict[Job, deque[Request]] = OrderedDict()
        self._flights: dict[Request, _Flight] = {}
        self._last: dict[Job, Engine] = {}  # which has the job's context in its cache
        self._latencies: deque[float] = deque(maxlen=64)
        self._warned: set[Engine] = set()

    def run(
        self,
        jobs: Iterable[Job],
        finished: Callable[[Job], None],
        answered: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        """Runs all jobs; they are taken as there is room for their requests.

        Args:
            jobs: One after the other; may take its time to give the next.
            finished: Is given each job that is finished.
            answered: Is given each outcome that counts.

        Raises:
            EngineError: no engine is left that answers.
        """
        self._jobs, self._exhausted = iter(jobs), False
        self._finished, self._answered = finished, answered
        wake = threading.Event()
        with contextlib.ExitStack() as stack:
            for engine in self.engines:
                stack.enter_context(engine.running(wake))
            while True:
                self._feed()
                if self._exhausted and not self._flights and not self._waiting:
                    return
                if not any(engine.works_here for engine in self.engines):
                    wake.wait(_LOOK)
                wake.clear()
                for engine in self.engines:
                    for outcome in engine.step():
                        self._take(engine, outcome)
                self._look_after_the_ill()

    def _feed(self) -> None:
        """Gives engines what they have room for, the emptiest first."""
        for engine in sorted(self.engines, key=lambda one: -one.room()):
            while (room := engine.room()) > 0:
                requests = self._choose(engine, room) or self._late(engine, room)
                if not requests:
                    break
                engine.begin(requests)

    def _choose(self, engine: Engine, room: int) -> list[Request]:
        job = self._choose_job(engine)
        if job is None:
            return []
        queue = self._waiting[job]
        requests = [queue.popleft() for _ in range(min(room, len(queue)))]
        if not queue:
            del self._waiting[job]
        now = time.monotonic()
        for request in requests:
            self._flights[request] = _Flight(job, now, {engine})
        self._last[job] = engine
        return requests

    def _choose_job(self, engine: Engine) -> Job | None:
        """Whose requests the engine is given: those of a context that it has, else of one that nobody has yet, else of
        any, so that no engine is idle while there is work. One that has all the contexts it can hold gets no other."""
        if engine.max_contexts is not None:
            held = {flight.job for flight in self._flights.values() if engine in flight.engines}
            if len(held) >= engine.max_contexts:
                return next((job for job in self._waiting if job in held), None)
        mine = next((job for job in self._waiting if self._last.get(job) is engine), None)
        fresh = next((job for job in self._waiting if job not in self._last), None)
        return mine or fresh or self._open() or next(iter(self._waiting), None)

    def _open(self) -> Job | None:
        """The next job that has requests."""
        while not self._exhausted:
            job = next(self._jobs, None)
            if job is None:
                self._exhausted = True
            elif requests := job.begin():
                self._waiting[job] = deque(requests)
                return job
            else:
                self._finished(job)  # nothing was to be asked
        return None

    def _late(self, engine: Engine, room: int) -> list[Request]:
        """Requests that take far longer than others do, for an engine that has nothing else to do: the first answer
        counts, and an engine that hangs holds nothing up."""
        if engine.max_contexts is not None or len(self._latencies) < 3:
            return []
        patience = max(_PATIENCE, _SLOW * statistics.median(self._latencies))
        now = time.monotonic()
        late = [
            request
            for request, flight in self._flights.items()
            if now - flight.since > patience and engine not in flight.engines and len(flight.engines) == 1
        ][:room]
        for request in late:
            self._flights[request].engines.add(engine)
        return late

    def _take(self, engine: Engine, outcome: Outcome) -> None:
        flight = self._flights.get(outcome.request)
        if flight is None:
            return  # another engine was faster
        if outcome.generation is None and not outcome.refused:
            flight.engines.discard(engine)
            if not flight.engines:
                del self._flights[outcome.request]
                self._waiting.setdefault(flight.job, deque()).appendleft(outcome.request)
                self._waiting.move_to_end(flight.job, last=False)
                self._last.pop(flight.job, None)
            return
        del self._flights[outcome.request]
        self._latencies.append(time.monotonic() - flight.since)
        requests = flight.job.receive(outcome)
        self._answered(outcome)
        if requests:
            self._waiting.setdefault(flight.job, deque()).extend(requests)
            self._waiting.move_to_end(flight.job, last=False)  # what is begun is ended first
        if flight.job.finished:
            self._last.pop(flight.job, None)
            self._finished(flight.job)

    def _look_after_the_ill(self) -> None:
        reasons = {engine: engine.hopeless for engine in self.engines if engine.hopeless}
        if len(reasons) == len(self.engines):
            raise EngineError(
                f"{' '.join(dict.fromkeys(filter(None, reasons.values())))} What is finished is kept in `output_dir`: run "
                "the same command again once that is mended."
            )
        for engine in reasons.keys() - self._warned:
            self._warned.add(engine)
            warnings.warn(f"{reasons[engine]} The others go on without it.", stacklevel=2)
