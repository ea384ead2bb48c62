"""What a back end has to offer: continuations behind a context, and the teacher's targets."""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from ..teacher_targets import Targets, TopK


@dataclass(frozen=True, eq=False)
class Generation:
    """A sampled continuation.

    Args:
        token_ids: The sampled ids, with the end-of-turn token if the model ended it.
        top_k: The teacher's targets for those ids, where the engine gives them along with the tokens.
        ended: Whether the model ended it, where the engine says so instead of giving the end-of-turn token.
    """

    token_ids: list[int]
    top_k: TopK | None = None
    ended: bool = False


class BackendError(RuntimeError):
    """A back end failed for good; what was finished before is kept, and the same command carries on."""


class ContextSession(Protocol):
    """A back end with one context in front of every row."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        """Samples one continuation of each prompt (token ids behind the context).

        A row is drawn with its own seed: what it becomes does not depend on the rows beside it, beyond rounding.
        `temperature=0` is greedy.
        """
        ...

    def targets(self, rows: Sequence[Sequence[int]], num_predicted: Sequence[int]) -> list[Targets]:
        """The teacher's targets for the last `num_predicted[i]` tokens of each row (token ids behind the context)."""
        ...


class Backend(Protocol):
    """Generates and scores token ids; tokenization is none of its business.

    Args:
        model_name: Name or path of the model, for the data set's identity.
        fingerprint: Tells models apart that have one name; empty where that is unknown.
        max_length: Tokens that fit into the model's window; `None` where that is unknown.
        target_kinds: Which of `hidden_states` and `top_k` it can give.
        end_ids: Token ids that end an answer.
    """

    model_name: str
    max_length: int | None
    target_kinds: tuple[str, ...]
    end_ids: Set[int]

    @property
    def fingerprint(self) -> str: ...

    def running(self) -> AbstractContextManager[None]:
        """Entered around a whole run."""
        ...

    def in_context(self, context_ids: Sequence[int]) -> AbstractContextManager[ContextSession]:
        """Puts a context (it may be empty) in front of every row."""
        ...

    def divergence(self, teacher: Targets, other: Targets) -> float:
        """Mean KL(teacher || other) in nats per position."""
        ...

    def top_k(self, targets: Targets, k: int, mass: float) -> TopK:
        """Targets of any kind as the top k, cut at a probability mass."""
        ...
