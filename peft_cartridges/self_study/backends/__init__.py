"""What writes the conversations."""

from .transformers_backend import TransformersBackend

__all__ = ["TransformersBackend"]
