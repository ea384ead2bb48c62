"""`KVPrefix`: the keys and values that one text left in every attention layer of a causal LM.

A document in context, a cartridge, its initialization and a composition of several are all a `KVPrefix`; the rest of
the package computes, trains, cuts, joins and serves them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True, eq=False)
class KVPrefix:
    """Per-layer keys and values of a prefix, without a batch dimension: every row of a batch can attend to them.

    Position embeddings are already applied to the keys: the prefix holds positions `0 … num_tokens - 1`, and the
    first real token after it sits at position `num_tokens`.

    Args:
        keys (`tuple[Tensor, ...]`):
            One tensor `[num_key_value_heads, num_tokens, head_dim]` per attention layer, first layer first.
        values (`tuple[Tensor, ...]`):
            Likewise. Heads and head_dim may differ between layers, and between keys and values; `num_tokens` may not.

    Raises:
        ValueError: the numbers of layers or tokens disagree, or a tensor does not have three dimensions.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(self.keys))
        object.__setattr__(self, "values", tuple(self.values))
        if not self.keys or len(self.keys) != len(self.values):
            raise ValueError(
                f"`keys` and `values` need one tensor per layer each, got {len(self.keys)} and {len(self.values)}."
            )
        num_tokens = self.keys[0].shape[1] if self.keys[0].ndim == 3 else -1
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            for name, tensor in (("keys", key), ("values", value)):
                if tensor.ndim != 3 or tensor.shape[1] != num_tokens or tensor.shape[0] != key.shape[0]:
                    raise ValueError(
                        f"`{name}[{layer}]` has shape {tuple(tensor.shape)}, expected "
                        f"[num_key_value_heads, num_tokens={num_tokens}, head_dim]."
                    )

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[1]

    def __len__(self) -> int:
        return self.num_tokens

    @property
    def nbytes(self) -> int:
        """Size of all keys and values in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    def __repr__(self) -> str:
        heads, _, head_dim = self.keys[0].shape
        return (
            f"KVPrefix(num_tokens={self.num_tokens}, num_layers={self.num_layers}, num_key_value_heads={heads}, "
            f"head_dim={head_dim}, dtype={self.dtype}, nbytes={self.nbytes})"
        )

    # -- where it comes from -----------------------------------------------------------------------------------------

    @classmethod
    def from_text(
        cls,
        model: nn.Module,
        processing_class: Any,
        text: str,
        *,
        chat_template: bool = True,
        max_tokens: int | None = None,
        prefill_chunk_size: int = 2048,
    ) -> KVPrefix:
        """The prefix of `text`, by one prefill of `model`.

        Args:
            model: A transformers causal LM (not a PEFT model with an active cartridge: disable it first).
            processing_class: Its tokenizer or processor, or a `ChatCodec` with it.
            text: The document.
            chat_template: Whether the text stands in a system message of the tokenizer's chat template (as a user
                would put a document in context; see `ChatCodec.encode_context`) or as it is. Ignored where the tokenizer has no chat template.
            max_tokens: Keep only this many first tokens (nothing after them is computed).
            prefill_chunk_size: Tokens per forward, so that activations stay flat however long the text is.

        Raises:
            ValueError: `text` is empty.
        """
        from .chat import ChatCodec  # a prefix knows no chat template: only this way of making one does

        input_ids = ChatCodec.of(None, processing_class).encode_context(text, chat_template=chat_template)
        return cls.from_input_ids(model, input_ids[:max_tokens], prefill_chunk_size=prefill_chunk_size)

    @classmethod
    def from_input_ids(
        cls, model: nn.Module, input_ids: Sequence[int] | Tensor, *, prefill_chunk_size: int = 2048
    ) -> KVPrefix:
        """The prefix of a sequence of token ids (`[num_tokens]` or `[1, num_tokens]`), by one prefill of `model`; see
        `attention.reading.read_prefix`."""
        from .attention.reading import read_prefix  # knows models, which this file does not

        return read_prefix(model, input_ids, prefill_chunk_size=prefill_chunk_size)

    @classmethod
    def from_cache(cls, cache: Cache, num_tokens: int | None = None, row: int = 0) -> KVPrefix:
        """One row of a transformers `Cache`, at most its first `num_tokens` tokens.

        Raises:
            ValueError: the cache is empty, holds another kind of state than keys and values, or has fewer tokens.
        """
        keys, values = [], []
        layer: Any
        for index, layer in enumerate(cache.layers):
            if not isinstance(getattr(layer, "keys", None), Tensor) or layer.keys.ndim != 4 or layer.keys.shape[2] == 0:
                raise ValueError(f"Layer {index} of the cache ({type(layer).__name__}) holds no keys and values.")
            if (seen := int(layer.get_seq_length())) > layer.keys.shape[2]:
                raise ValueError(
                    f"Layer {index} of the cache ({type(layer).__name__}) has seen {seen} tokens but keeps only "
                    f"{layer.keys.shape[2]}: prefill into a `DynamicCache()` made without a config, which keeps all."
                )
            keep = slice(0, seen if num_tokens is None else num_tokens)
            if num_tokens is not None and seen < num_tokens:
                raise ValueError(f"`num_tokens={num_tokens}`, but layer {index} of the cache holds {seen} tokens.")
            keys.append(layer.keys[row, :, keep].clone())
            values.append(layer.values[row, :, keep].clone())
        if not keys:
            raise ValueError("The cache is empty: run the model with `past_key_values=cache, use_cache=True` first.")
        return cls(tuple(keys), tuple(values))

    @classmethod
    def from_prompt_embeddings(cls, prompt_embeddings: Tensor, *, num_layers: int, num_heads: int) -> KVPrefix:
        """From stock PEFT's flat tensor `[num_tokens, num_layers * 2 * token_dim]` (file format of CARTRIDGE and of
        prefix tuning), where `token_dim = num_key_value_heads * head_dim`.

        Raises:
            ValueError: the tensor's width is not a multiple of `num_layers * 2 * num_heads`.
        """
        if prompt_embeddings.ndim != 2 or prompt_embeddings.shape[1] % (2 * num_layers * num_heads):
            raise ValueError(
                f"`prompt_embeddings` has shape {tuple(prompt_embeddings.shape)}, expected [num_tokens, num_layers * 2 "
                f"* num_heads * head_dim] with num_layers={num_layers} and num_heads={num_heads}."
            )
        # [num_tokens, 2 * num_layers, heads, head_dim] -> [2 * num_layers, heads, num_tokens, head_dim]
        stacked = prompt_embeddings.reshape(len(prompt_embeddings), 2 * num_layers, num_heads, -1).permute(1, 2, 0, 3)
        return cls(tuple(t.contiguous() for t in stacked[0::2]), tuple(t.contiguous() for t in stacked[1::2]))

    # -- where it goes -----------------------------------------------------------------------------------------------

    def to_prompt_embeddings(self) -> Tensor:
        """Stock PEFT's flat tensor `[num_tokens, num_layers * 2 * token_dim]`.

        Raises:
            ValueError: the layers do not all have one shape, which that format cannot express.
        """
        shapes = {tuple(tensor.shape) for tensor in (*self.keys, *self.values)}
        if len(shapes) > 1:
            raise ValueError(f"Stock PEFT's format needs layers of one shape, this prefix has {sorted(shapes)}.")
        stacked = torch.stack([tensor for pair in zip(self.keys, self.values, strict=True) for tensor in pair])
        return stacked.permute(2, 0, 1, 3).reshape(self.num_tokens, -1).contiguous()

    def to_cache(self, batch_size: int = 1) -> DynamicCache:
        """A `DynamicCache` to pass as `past_key_values`, without this package: a copy for each of `batch_size` rows."""
        cache = DynamicCache()
        for key, value in zip(self.keys, self.values, strict=True):
            layer = DynamicLayer()
            layer.update(*(tensor.expand(batch_size, *tensor.shape).clone() for tensor in (key, value)))
            cache.layers.append(layer)
        return cache

    def to(self, *args: Any, **kwargs: Any) -> KVPrefix:
        """As `Tensor.to` (device, dtype), for every layer."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> KVPrefix:
        return self._map(Tensor.detach)

    # -- cut and join ------------------------------------------------------------------------------------------------

    def __getitem__(self, tokens: slice | Sequence[int] | Tensor) -> KVPrefix:
        """The chosen tokens (a slice, or indices in any order). Keys keep the positions they were computed at."""
        if not isinstance(tokens, slice):
            tokens = torch.as_tensor(tokens)
        return self._map(lambda tensor: tensor[:, tokens if isinstance(tokens, slice) else tokens.to(tensor.device)])

    @staticmethod
    def concatenate(prefixes: Sequence[KVPrefix]) -> KVPrefix:
        """Joins prefixes along the token axis, in order. Keys keep the positions they were computed at, as the paper
        (arXiv 2506.06266, section on composition) and stock PEFT do: nothing is rotated anew.

        Raises:
            ValueError: nothing to join, or prefixes of models with different layers.
        """
        if not prefixes:
            raise ValueError("`prefixes` is empty: nothing to concatenate.")
        shapes = [[(*k.shape[::2], v.shape[2]) for k, v in zip(p.keys, p.values, strict=True)] for p in prefixes]
        for number, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"`prefixes[{number}]` belongs to a model of another shape than `prefixes[0]` "
                    f"(layers as (num_key_value_heads, head_dim, value_dim): {shape} against {shapes[0]})."
                )
        joined = [
            tuple(
                torch.cat(layer, dim=1) for layer in zip(*(getattr(prefix, part) for prefix in prefixes), strict=True)
            )
            for part in ("keys", "values")
        ]
        return KVPrefix(*joined)

    def _map(self, function: Any) -> KVPrefix:
        return KVPrefix(tuple(map(function, self.keys)), tuple(map(function, self.values)))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), with every module's own mode put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
