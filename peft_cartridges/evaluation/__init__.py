"""What a cartridge is worth."""

from .gold_answers import gold_answer_nll

__all__ = ["gold_answer_nll"]
