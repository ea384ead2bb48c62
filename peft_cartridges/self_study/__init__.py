"""Self-study: the model writes conversations about a corpus that it has in context."""

from .chunking import Chunk, Document
from .corpus import load_corpus
from .dataset_card import make_dataset_card, push_self_study
from .estimate import estimate_run
from .preview import format_conversation
from .synthesis_config import SynthesisConfig
from .synthesis_report import format_report, read_report
from .synthesizer import SelfStudySynthesizer

__all__ = [
    "Chunk",
    "Document",
    "SelfStudySynthesizer",
    "SynthesisConfig",
    "estimate_run",
    "format_conversation",
    "format_report",
    "load_corpus",
    "make_dataset_card",
    "push_self_study",
    "read_report",
]
