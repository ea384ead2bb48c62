"""What a cartridge is worth, and what it costs."""

from .break_even import BreakEven, training_tokens
from .context_gap import ContextGap, measure_context_gap
from .gold_answers import gold_answer_nll

__all__ = ["BreakEven", "ContextGap", "gold_answer_nll", "measure_context_gap", "training_tokens"]
