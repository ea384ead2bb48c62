"""The state that a text leaves in a model's recurrent layers, however long the text is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..attention.probe import find_attention_layers
from ..chat import ChatCodec
from ..kv_prefix import KVPrefix
from ..tuner.states import join_states
from .corpus_tokens import encode_corpus, parts_of_at_most, read_window


def states_after_text(
    model: nn.Module, processing_class: Any, text: str, *, chat_template: bool
) -> tuple[Mapping[str, Tensor], ...]:
    """The state of each recurrent layer after `text`, by the names of its parts.

    A model without attention has no window: its state is that after the whole text. A hybrid one is not to be read beyond
    the positions that it has; of a longer text the states of equal parts, each read behind the text's first token, are
    joined as those of several cartridges are (`tuner.states.join_states`).

    Raises:
        ValueError: `text` is empty.
    """
    codec = ChatCodec.of(model, processing_class)
    input_ids = encode_corpus(codec, text, num_tokens=1, chat_template=chat_template)
    if not find_attention_layers(model, skip_unsupported=True):
        return KVPrefix.from_input_ids(model, input_ids).states
    parts = parts_of_at_most(read_window(model) - 1, input_ids[1:])
    read = [KVPrefix.from_input_ids(model, [input_ids[0], *part]).states for part in parts]
    return tuple(join_states(layer) for layer in zip(*read, strict=True))
