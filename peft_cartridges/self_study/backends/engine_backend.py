"""What back ends have in common that are engines: they give top-k log-probabilities, and share contexts by their own
prefix caching."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from typing import Any

from ...chat import ChatCodec
from ..teacher_targets import Targets, TopK, top_k_divergence
from .base import Generation


class EngineBackend(ABC):
    """Sends a chunk's token ids in front of every prompt.

    Args:
        model_name: Name or path of the model.
        processing_class: Its tokenizer or processor.
        top_k: Log-probabilities to ask for per position.
        max_length: Tokens that fit into the model's window, if known.
    """

    target_kinds: tuple[str, ...] = ("top_k",)
    fingerprint = ""

    def __init__(self, model_name: str, processing_class: Any, *, top_k: int, max_length: int | None) -> None:
        self.model_name = model_name
        self.k = top_k
        self.max_length = max_length
        self.end_ids: Set[int] = ChatCodec.of(None, processing_class).end_ids
        self.context: list[int] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def in_context(self, context_ids: Sequence[int]) -> Iterator[EngineBackend]:
        self.context = list(context_ids)
        try:
            yield self
        finally:
            self.context = []

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        """As `ContextSession.generate`."""

    @abstractmethod
    def targets(self, rows: Sequence[Sequence[int]], num_predicted: Sequence[int]) -> list[Targets]:
        """As `ContextSession.targets`."""

    def divergence(self, teacher: Targets, other: Targets) -> float:
        """As `Backend.divergence`, over the tokens that the engine lists."""
        assert isinstance(teacher, TopK) and isinstance(other, TopK)
        return top_k_divergence(teacher, other)

    def top_k(self, targets: Targets, k: int, mass: float) -> TopK:
        """As `Backend.top_k`.

        Raises:
            ValueError: more tokens are wanted than the engine was asked for.
        """
        assert isinstance(targets, TopK)
        if k > self.k:
            raise ValueError(
                f"`teacher_top_k` is {k}, but the back end asks its engine for {self.k} log-probabilities: lower it, or "
                "make the back end with a larger `top_k` (most engines give at most 20)."
            )
        return targets.cut(k, mass)
