"""The conversation set, an artifact of its own: written part by part, loaded, merged, kept, pushed, with its provenance."""

from .folder import ConversationFolder, Part
from .hub import make_dataset_card, push_self_study
from .loading import load_self_study, merge_self_study, save_self_study
from .provenance import read_provenance, read_report
from .report import format_conversation, format_report
from .rows import make_features, with_fast_targets

__all__ = [
    "ConversationFolder",
    "Part",
    "format_conversation",
    "format_report",
    "load_self_study",
    "make_dataset_card",
    "make_features",
    "merge_self_study",
    "push_self_study",
    "read_provenance",
    "read_report",
    "save_self_study",
    "with_fast_targets",
]
