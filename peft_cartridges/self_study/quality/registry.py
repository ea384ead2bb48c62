"""The quality filters by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .base import QualityFilter
from .duplicate import Duplicate
from .empty import Empty
from .near_duplicate import NearDuplicate
from .refusal import Refusal
from .truncated import TruncatedAnswer, TruncatedQuestion
from .vague_question import VagueQuestion

# Cut answers are kept by default: the teacher's distribution is as good on the first half of an answer as on a whole.
DEFAULT_FILTERS = ("empty", "refusal", "duplicate")

_FILTERS: dict[str, Callable[[], QualityFilter]] = {
    "empty": Empty,
    "truncated_question": TruncatedQuestion,
    "truncated_answer": TruncatedAnswer,
    "refusal": Refusal,
    "duplicate": Duplicate,
    "near_duplicate": NearDuplicate,
    "vague_question": VagueQuestion,
}


def list_filters() -> list[str]:
    """Names that `SynthesisConfig.quality_filters` takes."""
    return sorted(_FILTERS)


def register_filter(name: str, make: Callable[[], QualityFilter]) -> None:
    """Enters a filter of your own.

    Raises:
        ValueError: the name is taken.
    """
    if name in _FILTERS:
        raise ValueError(f"There is a quality filter `{name}` already: choose another name.")
    _FILTERS[name] = make


def check_filters(names: Sequence[str]) -> None:
    """Raises:
    ValueError: a name is unknown.
    """
    if unknown := [name for name in names if name not in _FILTERS]:
        raise ValueError(f"`quality_filters` has {', '.join(unknown)}; there are: {', '.join(list_filters())}.")


def make_filters(names: Sequence[str], *, max_similarity: float = 0.8) -> dict[str, QualityFilter]:
    """New filters, in the order of `names`; the first that drops a conversation is the reason that is reported."""
    check_filters(names)
    return {
        name: NearDuplicate(max_similarity) if _FILTERS[name] is NearDuplicate else _FILTERS[name]() for name in names
    }
