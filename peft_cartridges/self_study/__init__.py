"""Self-study: the model writes conversations about a corpus that it has in context."""

from .chunking import Chunk, Document
from .synthesis_config import SynthesisConfig
from .synthesizer import SelfStudySynthesizer

__all__ = ["Chunk", "Document", "SelfStudySynthesizer", "SynthesisConfig"]
