"""Decoding that keeps the batch full: as soon as a row is finished, the next prompt takes its place.

Rows live in slots of one buffer. Each has its own length, so nothing is padded on the left, and a step costs what its
rows need: a finished row's slot is filled by the last row, and the batch is a view of the first slots.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from ...attention.contexts import PrefixesOfRows
from ...attention.probe import find_recurrent_layers
from ...hidden_states import OutputHead, pad_right
from ...kv_prefix import KVPrefix

# Prompts are prefilled together while the longest has no more than so many times the tokens of the shortest, or they are
# fewer tokens than a forward takes in its stride.
_LONGER, _PIECE = 1.25, 512


def can_decode_in_slots(model: Any) -> bool:
    """Whether all of the model's memory is keys and values, and its attention takes a mask per row: eager and sdpa do,
    flash and flex attention do not."""
    config = model.config.get_text_config(decoder=True)
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention", "attention"}
    if other or config._attn_implementation not in ("eager", "sdpa"):
        return False
    return not find_recurrent_layers(model, skip_unsupported=True)


class _Slots:
    """How many rows there are, and how many tokens each has in the cache: `lengths` `[slots]`."""

    def __init__(self, device: torch.device) -> None:
        self.capacity = self.slots = self.count = self.width = 0
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)

    def grow(self, slots: int, capacity: int) -> None:
        """Makes room for so many rows of so many tokens; what is there stays."""
        self.slots, self.capacity = max(slots, self.slots), max(capacity, self.capacity)
        lengths = self.lengths.new_zeros(self.slots)
        lengths[: len(self.lengths)] = self.lengths
        self.lengths = lengths


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: `[slots, num_key_value_heads, capacity, head_dim]`."""

    is_sliding = False

    def __init__(self, slots: _Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def buffer(states: Tensor) -> Tensor:
            return states.new_zeros(self.slots.slots, states.shape[1], self.slots.capacity, states.shape[3])

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def grow(self) -> None:
        """Takes the size that `slots` has now."""
        if self.keys is None or self.values is None:
            return
        old = self.keys, self.values
        self.lazy_initialization(*old)
        self.keys[: len(old[0]), :, : old[0].shape[2]] = old[0]
        self.values[: len(old[1]), :, : old[1].shape[2]] = old[1]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends one token to each row; gives `[rows, heads, width, head_dim]`, `width` of the longest row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        count, width = self.slots.count, self.slots.width
        rows = torch.arange(count, device=key_states.device)
        lengths = self.slots.lengths[:count].to(key_states.device)
        self.keys[rows, :, lengths] = key_states[:, :, 0]
        self.values[rows, :, lengths] = value_states[:, :, 0]
        return self.keys[:count, :, :width], self.values[:count, :, :width]

    def put(self, first: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values `[rows, heads, tokens, head_dim]` of new rows, from slot `first` on."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.keys is not None and self.values is not None
        self.keys[first : first + len(keys), :, : keys.shape[2]] = keys
        self.values[first : first + len(values), :, : values.shape[2]] = values

    def move(self, source: int, target: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.width, 0

    def get_seq_length(self) -> int:
        return max(self.slots.width - 1, 0)

    def get_max_length(self) -> int:
        return self.slots.capacity


@dataclass(eq=False)
class _Row:
    """A continuation that is wanted, and what there is of it."""

    name: Hashable
    prompt: list[int]
    max_new_tokens: int
    temperature: float
    uniform: list[float]
    prefix: KVPrefix | None
    tokens: list[int] = field(default_factory=list)


class SlotDecoder:
    """Samples continuations of prompts of any lengths; new ones may come at any time, each behind a prefix of its own.

    Args:
        model: A causal LM, with whatever prefix is active on it in front of the rows' own; its attention is eager or sdpa.
        end_ids: Token ids that end a continuation.
        slots: Rows decoded together.
    """

    def __init__(self, model: Any, end_ids: Set[int], *, slots: int) -> None:
        self.model = model
        self.head = OutputHead(model)
        self.decoder = self.head.decoder
        self.config = model.config.get_text_config(decoder=True)
        self.device = model.get_input_embeddings().weight.device
        self.dtype = model.get_input_embeddings().weight.dtype
        self.end_ids = end_ids
        self.slots = slots
        self.steps = 0  # forwards so far, prefills left out
        self.clear()

    def clear(self) -> None:
        """Forgets all rows, and gives their memory back."""
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # one a slot
        self._next: list[int] = []  # what each row is fed next
        self._state = _Slots(self.device)
        self._layers = [_SlotLayer(self._state) for _ in range(self.config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))
        self._prefixes: PrefixesOfRows | None = None

    def begin(
        self,
        name: Hashable,
        prompt: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        prefix: KVPrefix | None = None,
    ) -> None:
        """Wants a continuation of a prompt behind a prefix; it is drawn with its own seed. Rows behind the same prefix share
        it, whatever is beside them."""
        uniform = _uniform(seed, max_new_tokens) if temperature > 0 else []
        self._waiting.append(_Row(name, list(prompt), max_new_tokens, temperature, uniform, prefix))

    @torch.no_grad()
    def step(self) -> list[tuple[Any, list[int]]]:
        """One more token of each row; gives the rows that are finished: their names, and their new token ids up to and
        including an end token."""
        free = self.slots - len(self._rows)
        # Prompts are prefilled a few at a time: one by one would cost a forward each.
        if free and self._waiting and len(self._waiting) >= len(self._rows) // 8:
            shortest_first = sorted(self._waiting, key=lambda row: len(row.prompt))[:free]
            self._waiting = deque(row for row in self._waiting if row not in shortest_first)
            self._admit(shortest_first)
        if not self._rows:
            return []
        self._next = self._choose(self._step(self._next, self._cache, self._state))
        finished = []
        for slot in reversed(range(len(self._rows))):
            row = self._rows[slot]
            row.tokens.append(self._next[slot])
            if row.tokens[-1] in self.end_ids or len(row.tokens) == row.max_new_tokens:
                finished.append((row.name, row.tokens))
                self._release(slot)
        return finished

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[list[int]]:
        """New token ids of each prompt, up to and including an end token."""
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            self.begin(number, prompt, max_new_tokens, temperature, seed)
        results: list[list[int]] = [[] for _ in prompts]
        while self._waiting or self._rows:
            for number, tokens in self.step():
                results[number] = tokens
        return results

    def _admit(self, rows: list[_Row]) -> None:
        """All but the last token of each prompt is prefilled; the last is the row's first step."""
        longest = max(len(row.prompt) + row.max_new_tokens for row in rows)
        first, count = self._state.count, len(rows)
        if first + count > self._state.slots or longest > self._state.capacity:
            self._state.grow(min(self.slots, max(first + count, 2 * self._state.slots)), longest)
            for layer in self._layers:
                layer.grow()
        for piece in _of_like_length(rows):
            cached = [row.prompt[:-1] for row in piece]
            if any(cached):
                cache = DynamicCache()
                with self._behind(piece):
                    self.decoder(input_ids=pad_right(cached).to(self.device), past_key_values=cache, use_cache=True)
                filled: list[Any] = cache.layers
                for layer, one in zip(self._layers, filled, strict=False):
                    layer.put(first, one.keys, one.values)
            first += len(piece)
        first = self._state.count
        lengths = torch.tensor([len(row.prompt) - 1 for row in rows], device=self.device)
        self._state.lengths[first : first + count] = lengths
        self._state.count += count
        self._rows += rows
        self._next += [row.prompt[-1] for row in rows]

    def _choose(self, logits: Tensor) -> list[int]:
        """The next token of each row, of logits `[rows, vocab_size]`."""
        drawn = [slot for slot, row in enumerate(self._rows) if row.temperature > 0]
        if not drawn:
            return logits.argmax(-1).tolist()
        rows = [self._rows[slot] for slot in drawn]
        uniform = torch.tensor([row.uniform[len(row.tokens)] for row in rows], device=logits.device)
        temperatures = torch.tensor([row.temperature for row in rows], device=logits.device)
        if len(drawn) == len(self._rows):
            return _draw(logits, temperatures[:, None], uniform).tolist()
        tokens = logits.argmax(-1)
        tokens[drawn] = _draw(logits[drawn], temperatures[:, None], uniform)
        return tokens.tolist()

    def _step(self, tokens: list[int], cache: Cache, slots: _Slots) -> Tensor:
        """Logits `[rows, vocab_size]` behind one more token of each row."""
        lengths = slots.lengths[: slots.count]
        slots.width = int(lengths.max()) + 1
        with self._behind(self._rows):
            hidden = self.decoder(
                input_ids=torch.tensor(tokens, device=self.device)[:, None],
                position_ids=lengths[:, None],
                attention_mask=self._masks(lengths, slots.width),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        slots.lengths[: slots.count] += 1
        self.steps += 1
        return self.head(hidden[:, -1]).float()

    def _behind(self, rows: Sequence[_Row]) -> contextlib.AbstractContextManager[Any]:
        """The model with each row behind its prefix."""
        prefixes = [row.prefix for row in rows]
        if all(prefix is None for prefix in prefixes):
            return contextlib.nullcontext()
        if self._prefixes is None:
            self._prefixes = PrefixesOfRows(self.model)
        self._prefixes.assign(prefixes)
        return self._prefixes

    def _masks(self, lengths: Tensor, width: int) -> Any:
        """Additive masks `[rows, 1, 1, width]`: a row sees its own tokens, in sliding-window layers its last ones."""
        keys = torch.arange(width, device=lengths.device)
        seen = keys <= lengths[:, None]
        window = getattr(self.config, "sliding_window", None)
        recent = seen & (keys > lengths[:, None] - window) if window else seen
        kinds = set(getattr(self.config, "layer_types", None) or [])
        if len(kinds) > 1:
            return {kind: self._additive(recent if "sliding" in kind else seen) for kind in kinds}
        windowed = kinds == {"sliding_attention"} or not kinds
        return self._additive(recent if windowed else seen)

    def _additive(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
        return mask.masked_fill(~seen, torch.finfo(self.dtype).min)[:, None, None]

    def _release(self, slot: int) -> None:
        """The last row takes the finished one's place."""
        last = len(self._rows) - 1
        if slot != last:
            for layer in self._layers:
                layer.move(last, slot)
            self._state.lengths[slot] = self._state.lengths[last]
            self._rows[slot], self._next[slot] = self._rows[last], self._next[last]
        self._rows.pop()
        self._next.pop()
        self._state.count -= 1


def _of_like_length(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Rows, shortest prompt first, in pieces of at least `_PIECE` tokens of which little is padding."""
    pieces: list[list[_Row]] = [[]]
    for row in rows:
        piece = pieces[-1]
        if piece and len(row.prompt) > _LONGER * len(piece[0].prompt) and len(piece) * len(piece[-1].prompt) >= _PIECE:
            pieces.append([])
        pieces[-1].append(row)
    return pieces


def _uniform(seed: int, number: int) -> list[float]:
    return torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def _draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """One token per row `[rows]` of logits `[rows, vocab_size]` at temperatures `[rows, 1]`, by inverting the cumulative distribution at `uniform`
    `[rows]`: one random number a token, so that a row's draws are its own."""
    cumulative = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)
