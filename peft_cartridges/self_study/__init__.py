"""Self-study: the model writes conversations about a corpus that it has in context, and says how it would answer."""

from .engines import Engine, EngineError, OpenAIEngine, TransformersEngine, VLLMEngine
from .estimate import estimate_run
from .quality import Candidate, QualityFilter, register_filter
from .synthesis_config import SynthesisConfig
from .synthesizer import SelfStudySynthesizer

__all__ = [
    "Candidate",
    "Engine",
    "EngineError",
    "OpenAIEngine",
    "QualityFilter",
    "SelfStudySynthesizer",
    "SynthesisConfig",
    "TransformersEngine",
    "VLLMEngine",
    "estimate_run",
    "register_filter",
]
