"""How large a run is and how fast it learns, where nothing is said: by the corpus, the cartridge and the time there is.

Arithmetic alone; `budget.py` measures what it is given.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

# Per second of a budget this much is planned with: the last batches may be long ones, and saving takes a moment.
_USED = 0.92
# Peak learning rate where the text is no more than so many times as long as the cartridge; it grows with the shrinkage, up
# to twice: a short cartridge has further to go from where it begins (docs/training.md has the figures).
_LEARNING_RATE, _SHRINK, _MOST = 4e-2, 10.0, 2.0
# Conversations whose writing is measured first, and the fewest that a budget is planned with.
FEWEST = 32
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def default_learning_rate(corpus_tokens: int | None, num_tokens: int) -> float:
    """The peak learning rate of a cartridge of `num_tokens` of a text of `corpus_tokens` (`None`: unknown). Without tokens,
    of recurrent states alone, it goes by no length."""
    shrink = (corpus_tokens or 0) / num_tokens if num_tokens else 0.0
    return _LEARNING_RATE * min(max(shrink / _SHRINK, 1.0), _MOST)


def parse_budget(budget: str | float) -> float:
    """Seconds of `90`, `90s`, `5m`, `1.5h` or `1h30m`.

    Raises:
        ValueError: it is no such time, or not above 0.
    """
    text = str(budget).strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh]?)", text)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise ValueError(f"`budget` is {budget!r}: give a time, for instance 90s, 5m or 1h30m.")
    return seconds


@dataclass(frozen=True)
class RunSize:
    """What a run makes.

    Args:
        num_conversations: About the text.
        max_steps: Optimizer steps.
    """

    num_conversations: int
    max_steps: int


def fit_into(
    seconds: float,
    *,
    per_conversation: float,
    per_step: float,
    conversations: int,
    rows_per_step: int,
    off_context_share: float = 0.0,
    epochs: float = 3.0,
    made: int = 0,
    fixed_conversations: bool = False,
    fixed_steps: int | None = None,
) -> RunSize:
    """The largest run that ends in time: as many conversations as are wanted, each learned `epochs` times, or as many fewer
    as it takes; then as many steps as are left for them.

    Args:
        seconds: That there are.
        per_conversation: Seconds that writing (and scoring) one takes.
        per_step: Seconds of an optimizer step.
        conversations: That are wanted.
        rows_per_step: Rows of a step, over all processes and accumulated batches.
        off_context_share: Of the rows, beside them.
        epochs: Passes over the conversations.
        made: Conversations that are there.
        fixed_conversations: Whether all that are wanted are to be made, whatever is left for steps.
        fixed_steps: Steps that are to be made, whatever is left for conversations.
    """
    usable = max(seconds, 0.0) * _USED
    steps_each = epochs / (1 - off_context_share) / rows_per_step
    if fixed_conversations:
        number = conversations
    elif fixed_steps is not None:
        number = made + _times(usable - fixed_steps * per_step, per_conversation)
    else:
        # What is there costs its steps alone.
        number = _times(usable + made * per_conversation, per_conversation + steps_each * per_step)
    if not fixed_conversations:
        number = min(conversations, max(number, made, FEWEST))
    if fixed_steps is not None:
        return RunSize(number, fixed_steps)
    left = usable - max(number - made, 0) * per_conversation
    return RunSize(number, max(1, min(math.ceil(number * steps_each), _times(left, per_step))))


def _times(seconds: float, each: float) -> int:
    return int(max(seconds, 0.0) / max(each, 1e-9))
