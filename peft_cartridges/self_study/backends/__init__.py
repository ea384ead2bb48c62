"""What writes the conversations. The engines' packages are imported when a back end of theirs is made."""

from .base import Backend, BackendError, ContextSession, Generation
from .openai_backend import OpenAIBackend
from .transformers_backend import TransformersBackend
from .vllm_backend import VLLMBackend

__all__ = [
    "Backend",
    "BackendError",
    "ContextSession",
    "Generation",
    "OpenAIBackend",
    "TransformersBackend",
    "VLLMBackend",
]
