"""What an engine is: it takes requests while it has room, and gives what became of them, in any order."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from ...conversations.targets import TopK


class EngineError(RuntimeError):
    """No engine is left that could go on; what was finished is kept, and the same command carries on."""


@dataclass(frozen=True, eq=False)
class Request:
    """A continuation that is wanted, or the scoring of given tokens.

    Args:
        context: Token ids in front, shared by all requests about a chunk.
        prompt: Token ids behind the context; to be scored, with what is scored at the end.
        max_new_tokens: Longest continuation.
        temperature: 0 is greedy.
        seed: Of its draws: what it becomes does not depend on the requests beside it, beyond rounding.
        scored: If not 0, nothing is sampled: how many last tokens of `prompt` are wanted the top k for.
    """

    context: tuple[int, ...]
    prompt: list[int]
    max_new_tokens: int = 1
    temperature: float = 0.0
    seed: int = 0
    scored: int = 0


@dataclass(frozen=True, eq=False)
class Generation:
    """What came of a request.

    Args:
        token_ids: The sampled ids, with the end-of-turn token if the model ended it.
        top_k: The k likeliest tokens at each sampled (or scored) position, where the engine gives them.
        ended: Whether the model ended it, where the engine says so instead of giving the end-of-turn token.
    """

    token_ids: list[int]
    top_k: TopK | None = None
    ended: bool = False


@dataclass(frozen=True, eq=False)
class Outcome:
    """A request that is no longer under way: answered; or not, and to be put to another try (`generation` is `None`);
    or `refused` for what it asks, which no further try would change."""

    request: Request
    generation: Generation | None
    refused: bool = False


class Engine(ABC):
    """Generates and scores token ids; tokenization is none of its business. One thread calls it.

    Args:
        model_name: Name or path of the model, for the set's identity.
        max_length: Tokens that fit into the model's window; `None` where that is unknown.
        end_ids: Token ids that end an answer.
        max_contexts: How many jobs' requests, each job with a context of its own, it takes at a time; `None` where it does
            not matter.
        gives_top_k: Whether it gives the top k of what it samples, and scores.
        hopeless: Why it will most likely never answer again; `None` while all is well.
    """

    model_name: str
    fingerprint: str = ""
    max_length: int | None = None
    end_ids: Set[int]
    max_contexts: int | None = None
    gives_top_k = False
    hopeless: str | None = None

    def unreachable(self) -> str | None:
        """Why nothing can be asked of it, looked at before a run begins; `None` if all is well or that cannot be told."""
        return None

    @contextlib.contextmanager
    def running(self, wake: threading.Event) -> Iterator[None]:
        """Entered around a whole run; engines that work in threads set `wake` when they have something."""
        yield

    @abstractmethod
    def room(self) -> int:
        """How many requests it can begin now."""

    @abstractmethod
    def begin(self, requests: Sequence[Request]) -> None:
        """Takes requests, no more than it has room for."""

    @abstractmethod
    def step(self) -> list[Outcome]:
        """Works a little, where it works in this thread, and gives what is no longer under way."""

    def sample(self, requests: Sequence[Request]) -> list[Generation]:
        """Answers some requests of one context, at once and in order, outside of a run: whatever is active on a model in
        process stays active.

        Raises:
            EngineError: it does not answer.
        """
        left: deque[Request] = deque(requests)
        found: dict[Request, Generation] = {}
        while len(found) < len(requests):
            self.begin([left.popleft() for _ in range(min(self.room(), len(left)))])
            for outcome in self.step():
                if outcome.generation is None:
                    raise EngineError(self.hopeless or "The engine refused a request.")
                found[outcome.request] = outcome.generation
        return [found[request] for request in requests]

    @property
    def works_here(self) -> bool:
        """Whether it has work that goes on in `step` alone."""
        return False
