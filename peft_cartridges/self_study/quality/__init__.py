"""What makes a conversation not worth training on: one small class per reason, and a registry of them."""

from .base import Candidate, QualityFilter
from .registry import DEFAULT_FILTERS, check_filters, list_filters, make_filters, register_filter

__all__ = [
    "DEFAULT_FILTERS",
    "Candidate",
    "QualityFilter",
    "check_filters",
    "list_filters",
    "make_filters",
    "register_filter",
]
