"""`KVPrefix`: what one text left in every layer of a causal LM, keys and values in attention, a state in recurrent layers.

A document in context, a cartridge, its initialization and a composition of several are all a `KVPrefix`; the rest of
the package computes, trains, cuts, joins and serves them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin


@dataclass(frozen=True, eq=False)
class KVPrefix:
    """Per-layer keys, values and states of a prefix, without a batch dimension: every row of a batch can stand behind it.

    Position embeddings are already applied to the keys: the prefix holds positions `0 … num_tokens - 1`, and the
    first real token after it sits at position `num_tokens`.

    Args:
        keys (`tuple[Tensor, ...]`):
            One tensor `[num_key_value_heads, num_tokens, head_dim]` per attention layer, first layer first.
        values (`tuple[Tensor, ...]`):
            Likewise. Heads and head_dim may differ between layers, and between keys and values; `num_tokens` may not.
        states (`tuple[Mapping[str, Tensor], ...]`):
            What each recurrent layer (linear attention, state space, convolution) keeps of the whole text, first layer
            first: its tensors by name, `conv` the last inputs of its convolution and `recurrent` its memory. A layer
            that is both (attention beside a state space) stands in `keys`, `values` and `states`.
        num_tokens (`int`):
            How many tokens stand in front. It is that of the keys, and has to be said where there are none.

    Raises:
        ValueError: the numbers of layers or tokens disagree, or keys and values do not have three dimensions.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    states: tuple[Mapping[str, Tensor], ...] = ()
    num_tokens: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(self.keys))
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "states", tuple(dict(state) for state in self.states))
        if not (self.keys or self.states) or len(self.keys) != len(self.values):
            raise ValueError(
                f"`keys` and `values` need one tensor per layer each, got {len(self.keys)} and {len(self.values)}."
            )
        if self.keys:
            said, num_tokens = self.num_tokens, self.keys[0].shape[1] if self.keys[0].ndim == 3 else -1
            object.__setattr__(self, "num_tokens", num_tokens)
            if said not in (-1, num_tokens):
                raise ValueError(f"`num_tokens={said}`, but the keys have {num_tokens} tokens.")
        elif self.num_tokens < 0:
            raise ValueError("`num_tokens` has to be given: there are no keys that tell how many tokens were read.")
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            for name, tensor in (("keys", key), ("values", value)):
                if tensor.ndim != 3 or tensor.shape[1] != self.num_tokens or tensor.shape[0] != key.shape[0]:
                    raise ValueError(
                        f"`{name}[{layer}]` has shape {tuple(tensor.shape)}, expected "
                        f"[num_key_value_heads, num_tokens={self.num_tokens}, head_dim]."
                    )
        for layer, state in enumerate(self.states):
            if not state:
                raise ValueError(f"`states[{layer}]` holds nothing: name its tensors, or leave all states out.")

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Attention layers."""
        return len(self.keys)

    @property
    def num_recurrent_layers(self) -> int:
        return len(self.states)

    def __len__(self) -> int:
        return self.num_tokens

    def tensors(self) -> Iterator[Tensor]:
        """All keys, then all values, then the states layer by layer."""
        yield from self.keys
        yield from self.values
        for state in self.states:
            yield from state.values()

    @property
    def nbytes(self) -> int:
        """Size of all keys, values and states in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @property
    def dtype(self) -> torch.dtype:
        """That of the keys; where there are none, of the first state."""
        return next(self.tensors()).dtype

    def __repr__(self) -> str:
        parts = [f"num_tokens={self.num_tokens}"]
        if self.keys:
            heads, _, head_dim = self.keys[0].shape
            parts += [f"num_layers={self.num_layers}", f"num_key_value_heads={heads}", f"head_dim={head_dim}"]
        if self.states:
            parts.append(f"num_recurrent_layers={self.num_recurrent_layers}")
        return f"KVPrefix({', '.join(parts)}, dtype={self.dtype}, nbytes={self.nbytes})"

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

        Args:
            cache: Of keys and values, and of recurrent states where the model has any.
            num_tokens: How many tokens to keep. A recurrent state is that of all tokens, and cannot be cut; where a
                cache holds nothing else, this says how many tokens that were.
            row: Which row of the batch.

        Raises:
            ValueError: the cache is empty, holds another kind of memory, has fewer tokens, or cannot be cut.
        """
        keys, values, states = [], [], []
        layer: Any
        for index, layer in enumerate(cache.layers):
            is_recurrent = isinstance(layer, LinearAttentionCacheLayerMixin)
            if is_recurrent and (state := _state_of(layer, row)):
                states.append(state)
            if is_recurrent and not hasattr(layer, "keys"):
                if not state:
                    raise ValueError(f"Layer {index} of the cache ({type(layer).__name__}) holds no state.")
                continue
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
            if num_tokens is not None and seen > num_tokens and any(map(_is_recurrent, cache.layers)):
                raise ValueError(
                    f"`num_tokens={num_tokens}`, but the recurrent states of the cache are those of all {seen} tokens: "
                    "read the first tokens by themselves."
                )
            keys.append(layer.keys[row, :, keep].clone())
            values.append(layer.values[row, :, keep].clone())
        if not keys and not states:
            raise ValueError("The cache is empty: run the model with `past_key_values=cache, use_cache=True` first.")
        return cls(tuple(keys), tuple(values), tuple(states), -1 if num_tokens is None or keys else num_tokens)

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
            ValueError: the layers do not all have one shape, or there are states, which that format cannot express.
        """
        if self.states:
            raise ValueError("Stock PEFT's format holds keys and values only, this prefix has recurrent states.")
        shapes = {tuple(tensor.shape) for tensor in (*self.keys, *self.values)}
        if len(shapes) > 1:
            raise ValueError(f"Stock PEFT's format needs layers of one shape, this prefix has {sorted(shapes)}.")
        stacked = torch.stack([tensor for pair in zip(self.keys, self.values, strict=True) for tensor in pair])
        return stacked.permute(2, 0, 1, 3).reshape(self.num_tokens, -1).contiguous()

    def to_cache(self, batch_size: int = 1, *, config: Any = None) -> DynamicCache:
        """A `DynamicCache` to pass as `past_key_values`, without this package: a copy for each of `batch_size` rows.

        Args:
            batch_size: Number of rows.
            config: The model's configuration, which tells the layers that keep a state from those that attend; needed
                where there are states.

        Raises:
            ValueError: there are states and no `config`, or one of a model with other layers.
        """
        if not self.states:
            cache = DynamicCache()
            cache.layers = [DynamicLayer() for _ in self.keys]
        elif config is None:
            raise ValueError(
                "`config` is needed for a prefix with recurrent states: pass the model's (`model.config`)."
            )
        else:
            cache = DynamicCache(config=config)
            cache.layers = [
                DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers
            ]
        attending = [layer for layer in cache.layers if hasattr(layer, "keys")]
        recurrent = [layer for layer in cache.layers if _is_recurrent(layer)]
        if len(attending) != self.num_layers or len(recurrent) < self.num_recurrent_layers:
            raise ValueError(
                f"The prefix has {self.num_layers} layers with keys and {self.num_recurrent_layers} with states, `config` "
                f"{len(attending)} and {len(recurrent)}."
            )
        layer: Any
        for layer, key, value in zip(attending, self.keys, self.values, strict=True):
            layer.update(*(tensor.expand(batch_size, *tensor.shape).clone() for tensor in (key, value)))
        for layer, state in zip(recurrent, self.states, strict=False):
            for name, tensor in state.items():
                kind, _, number = name.partition("_")
                rows = tensor.expand(batch_size, *tensor.shape).clone()
                getattr(layer, f"update_{kind}_state")(rows, state_idx=int(number or 0))
                layer.has_previous_state[int(number or 0)] = True
        return cache

    def to(self, *args: Any, **kwargs: Any) -> KVPrefix:
        """As `Tensor.to` (device, dtype), for every layer."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> KVPrefix:
        return self.map(Tensor.detach)

    def map(self, function: Callable[[Tensor], Tensor]) -> KVPrefix:
        """With `function` applied to every tensor, in the order of `tensors`."""
        keys, values = tuple(map(function, self.keys)), tuple(map(function, self.values))
        states = tuple({name: function(tensor) for name, tensor in state.items()} for state in self.states)
        return KVPrefix(keys, values, states, -1 if self.keys else self.num_tokens)

    # -- cut and join ------------------------------------------------------------------------------------------------

    def without_states(self) -> KVPrefix:
        """The keys and values alone.

        Raises:
            ValueError: there are none.
        """
        return KVPrefix(self.keys, self.values)

    def __getitem__(self, tokens: slice | Sequence[int] | Tensor) -> KVPrefix:
        """The chosen tokens (a slice, or indices in any order). Keys keep the positions they were computed at.

        Raises:
            ValueError: there are recurrent states.
        """
        if self.states:
            raise ValueError(
                "A recurrent state is that of the whole text, and cannot be cut to some of its tokens: read those by "
                "themselves, or cut `prefix.without_states()`."
            )
        index = tokens if isinstance(tokens, slice) else torch.as_tensor(tokens)
        return self.map(lambda tensor: tensor[:, index if isinstance(index, slice) else index.to(tensor.device)])

    @staticmethod
    def concatenate(prefixes: Sequence[KVPrefix]) -> KVPrefix:
        """Joins prefixes along the token axis, in order. Keys keep the positions they were computed at, as the paper
        (arXiv 2506.06266, section on composition) and stock PEFT do: nothing is rotated anew.

        Raises:
            ValueError: nothing to join, prefixes of models with different layers, or with recurrent states, which do not
                concatenate.
        """
        if not prefixes:
            raise ValueError("`prefixes` is empty: nothing to concatenate.")
        for number, prefix in enumerate(prefixes):
            if prefix.states and len(prefixes) > 1:
                raise ValueError(
                    f"`prefixes[{number}]` has recurrent states, and the state of two texts does not follow from that of "
                    "each: read the texts as one, or join `prefix.without_states()`."
                )
        shapes = [[(*k.shape[::2], v.shape[2]) for k, v in zip(p.keys, p.values, strict=True)] for p in prefixes]
        for number, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"`prefixes[{number}]` belongs to a model of another shape than `prefixes[0]` "
                    f"(layers as (num_key_value_heads, head_dim, value_dim): {shape} against {shapes[0]})."
                )
        if len(prefixes) == 1:
            return prefixes[0].map(torch.clone)
        joined = [
            tuple(
                torch.cat(layer, dim=1) for layer in zip(*(getattr(prefix, part) for prefix in prefixes), strict=True)
            )
            for part in ("keys", "values")
        ]
        return KVPrefix(joined[0], joined[1])


def _is_recurrent(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def _state_of(layer: Any, row: int) -> dict[str, Tensor]:
    """What a recurrent layer of a cache holds of one row, by name."""
    state = {}
    for number in range(len(layer.conv_states)):
        suffix = f"_{number}" if number else ""
        if layer.is_conv_states_initialized[number]:
            kept = layer.conv_states[number][..., -layer.conv_kernel_size[number] :]
            state[f"conv{suffix}"] = kept[row].clone()
        if layer.is_recurrent_states_initialized[number]:
            state[f"recurrent{suffix}"] = layer.recurrent_states[number][row].clone()
    return state


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
