"""Recurrent layers behind a prefix: linear attention, state spaces and convolutions that begin from a state of a text.

Knows how modules keep their states and go on from them; which states are due is told from above (`attention`).
"""

from .cache_memory import CacheMemory
from .layers import RecurrentLayer, StateShape
from .own_memory import is_first
from .starting import go_on, goes_on, run_from_state

__all__ = ["CacheMemory", "RecurrentLayer", "StateShape", "go_on", "goes_on", "is_first", "run_from_state"]
