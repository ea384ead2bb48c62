"""What every baseline is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ...attention.probe import get_text_config
from ...chat import ChatCodec
from ..system import NotApplicable

# What a question, its answer and the chat template's tokens take behind the text.
_BEHIND = 256


@dataclass
class Bench:
    """A text, a model, and the size that methods may have.

    Args:
        model: A transformers causal LM, or a PEFT model around one, whose adapters are left out.
        processing_class: The base model's tokenizer or processor.
        text: The corpus.
        num_tokens: Tokens of keys and values that a method may keep: those of the cartridge.
        conversations: The self-study data set, for methods that train on it.
        steps, batch_size: Optimizer steps of such methods, and conversations in each.
        unrelated_text: Another text, for the initialization by one.
        encoder: Embeds texts for the dense retriever: `encode(list of texts)` gives an array `[texts, width]`, as
            `SentenceTransformer` does; or its name on the Hub. By default the model itself, its final states averaged.
        kvpress_python: The interpreter of an environment with kvpress.
        work_dir: For files between processes; a temporary folder by default.
        seed: Of methods that draw.
    """

    model: nn.Module
    processing_class: Any
    text: str
    num_tokens: int
    conversations: Any = None
    steps: int = 60
    batch_size: int = 16
    unrelated_text: str = ""
    encoder: Any = None
    kvpress_python: str | None = None
    work_dir: Path | None = None
    seed: int = 0
    codec: ChatCodec = field(init=False, repr=False)
    text_ids: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_tokens < 0:
            raise ValueError(f"`num_tokens` must be at least 0, got {self.num_tokens}.")
        self.codec = ChatCodec.of(self.model, self.processing_class)
        self.text_ids = self.codec.encode_context(self.text)  # as it stands in context

    @property
    def window(self) -> int | None:
        return getattr(get_text_config(self.model), "max_position_embeddings", None)

    def check_window(self) -> None:
        """Raises:
        NotApplicable: the text does not fit into the model's window together with a question.
        """
        if self.window is not None and len(self.text_ids) + _BEHIND > self.window:
            raise NotApplicable(
                f"the text has {len(self.text_ids):,} tokens, the model's window {self.window:,}: it does not fit"
            )
