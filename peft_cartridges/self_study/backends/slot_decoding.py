"""Decoding that keeps the batch full: as soon as a row is finished, the next prompt takes its place.

Rows live in slots of one buffer. Each has its own length, so nothing is padded on the left, and a step costs what its
rows need: a finished row's slot is filled by the last row, and the batch is a view of the first slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from ...attention import find_attention_layers, find_decoder
from ...attention.layers import get_text_config
from ...hidden_states import OutputHead, pad_right


def can_decode_in_slots(model: Any) -> bool:
    """Whether the model's attention takes a mask per row: eager and sdpa do, flash and flex attention do not."""
    return get_text_config(model)._attn_implementation in ("eager", "sdpa")


class _Slots:
    """How many rows there are, and how many tokens each has in the cache: `lengths` `[slots]`."""

    def __init__(self, slots: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.slots = slots
        self.count = 0
        self.width = 0
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)


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


class SlotDecoder:
    """Samples continuations of prompts of any lengths.

    Args:
        model: A causal LM, with whatever prefix is active on it; its attention is eager or sdpa.
        end_ids: Token ids that end a continuation.
        slots: Rows decoded together.
    """

    def __init__(self, model: Any, end_ids: Set[int], *, slots: int) -> None:
        layers = find_attention_layers(model)
        self.decoder = find_decoder(model, layers)[1]
        self.num_layers = len(layers)
        self.head = OutputHead(model)
        self.config = get_text_config(model)
        self.device = model.get_input_embeddings().weight.device
        self.dtype = model.get_input_embeddings().weight.dtype
        self.end_ids = end_ids
        self.slots = slots
        self.steps = 0  # forwards of the last call, prefills left out

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[list[int]]:
        """New token ids of each prompt, up to and including an end token. A row is drawn with its own seed."""
        results: list[list[int]] = [[] for _ in prompts]
        if not prompts:
            return results
        uniform = [_uniform(seed, max_new_tokens) for seed in seeds] if temperature > 0 else []
        slots = _Slots(min(self.slots, len(prompts)), max(map(len, prompts)) + max_new_tokens, self.device)
        layers = [_SlotLayer(slots) for _ in range(self.num_layers)]
        cache = Cache(layers=list(layers))
        waiting = deque(sorted(range(len(prompts)), key=lambda index: len(prompts[index])))
        rows: list[int] = []  # which prompt is in which slot
        tokens: list[int] = []  # what each row is fed next
        self.steps = 0
        while waiting or rows:
            free = slots.slots - len(rows)
            # Prompts are prefilled a few at a time: one by one would cost a forward each.
            if waiting and (not rows or free >= max(1, slots.slots // 8) or free >= len(waiting)):
                new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                self._admit([list(prompts[index]) for index in new], layers, slots)
                rows += new
                tokens += [prompts[index][-1] for index in new]
            logits = self._step(tokens, cache, slots)
            if temperature > 0:
                drawn = torch.tensor([uniform[row][len(results[row])] for row in rows], device=logits.device)
                tokens = _draw(logits, temperature, drawn).tolist()
            else:
                tokens = logits.argmax(-1).tolist()
            for slot in reversed(range(len(rows))):
                row = results[rows[slot]]
                row.append(tokens[slot])
                if tokens[slot] in self.end_ids or len(row) == max_new_tokens:
                    self._release(slot, rows, tokens, layers, slots)
        return results

    def _admit(self, prompts: list[list[int]], layers: list[_SlotLayer], slots: _Slots) -> None:
        """All but the last token of each prompt is prefilled; the last is the row's first step."""
        first, count = slots.count, len(prompts)
        cached = [prompt[:-1] for prompt in prompts]
        if any(cached):
            cache = DynamicCache()
            self.decoder(input_ids=pad_right(cached).to(self.device), past_key_values=cache, use_cache=True)
            filled: list[Any] = cache.layers
            for layer, one in zip(layers, filled, strict=True):
                layer.put(first, one.keys, one.values)
        slots.lengths[first : first + count] = torch.tensor([len(row) for row in cached], device=self.device)
        slots.count += count

    def _step(self, tokens: list[int], cache: Cache, slots: _Slots) -> Tensor:
        """Logits `[rows, vocab_size]` behind one more token of each row."""
        lengths = slots.lengths[: slots.count]
        slots.width = int(lengths.max()) + 1
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

    @staticmethod
    def _release(slot: int, rows: list[int], tokens: list[int], layers: list[_SlotLayer], slots: _Slots) -> None:
        """The last row takes the finished one's place."""
        last = len(rows) - 1
        if slot != last:
            for layer in layers:
                layer.move(last, slot)
            slots.lengths[slot] = slots.lengths[last]
            rows[slot], tokens[slot] = rows[last], tokens[last]
        rows.pop()
        tokens.pop()
        slots.count -= 1


def _uniform(seed: int, number: int) -> list[float]:
    return torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def _draw(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """One token per row `[rows]` of logits `[rows, vocab_size]`, by inverting the cumulative distribution at `uniform`
    `[rows]`: one random number a token, so that a row's draws are its own."""
    cumulative = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)
