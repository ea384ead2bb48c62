"""Recurrent layers behind a prefix: linear attention, state spaces and convolutions that begin from a state of a text.

Knows transformers' cache layers and what a module does with them; which states are due is told from above (attention)."""

from .layers import RecurrentLayer, StateShape
from .starting import go_on, goes_on, run_from_state

__all__ = ["RecurrentLayer", "StateShape", "go_on", "goes_on", "run_from_state"]
