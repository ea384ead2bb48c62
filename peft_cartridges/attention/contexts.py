"""`shared_prefix(model, prefix)`: a plain transformers model that has, for a while, read a text."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..kv_prefix import KVPrefix
from ..recurrent import CacheMemory, RecurrentLayer
from .callers import frames, generator_that_opens, thread_and_task
from .delivery import OPEN, prefix_host
from .interface import AttentionPath, LayerPrefix, WindowReading, expand_tokens
from .probe import AttentionLayer, execution_device
from .shared_prefix_attention import RowGroups


@dataclass(frozen=True, eq=False)
class _Held:
    """A prefix as the layers get it: attention layers by `parts`, recurrent ones by `states`."""

    prefix: KVPrefix
    parts: Sequence[LayerPrefix]
    states: Sequence[Mapping[str, Tensor]]


class SharedPrefix:
    """What `shared_prefix` gives: a context in which a model attends to a prefix. It can be entered once."""

    reusable = False

    def __init__(
        self,
        model: nn.Module,
        prefix: KVPrefix | Sequence[KVPrefix | None] | int,
        attention: AttentionPath = "auto",
        window: WindowReading = "windowed",
        verify: bool = False,
    ) -> None:
        self.model = model
        self.unverified = prefix if verify and isinstance(prefix, KVPrefix) else None
        self.host = prefix_host(model, skip_unsupported=isinstance(prefix, int))
        self.num_tokens: int | Tensor = 0
        self._reading: tuple[AttentionPath, WindowReading] = (attention, window)
        self._held: dict[int, _Held] = {}  # by the id of the prefix
        self._due: list[_Held] = []
        self._groups: RowGroups | None = None  # which rows each of them is for; `None` for all
        self._of_rows: list[KVPrefix | None] | None = None
        if self.unverified is not None and any(
            not isinstance(layer.memory, CacheMemory) for layer in self.host.recurrent
        ):
            raise ValueError(
                f"`verify=True` compares with the prefix in transformers' cache, which {type(self.host.decoder).__name__} has not."
            )
        self._holds_nothing = isinstance(prefix, int)
        if isinstance(prefix, int):
            self.num_tokens = prefix
        elif isinstance(prefix, KVPrefix):
            self.num_tokens = prefix.num_tokens
            self._due = [self._hold(prefix)]
        else:
            self._assign(prefix)
        self._state = "new"
        self._opener: FrameType | None = None
        self._home: tuple[int, Any] = (0, None)
        self.threads: set[int] = set()
        self._warned = False

    def _hold(self, prefix: KVPrefix) -> _Held:
        _check_prefix(prefix, self.host.layers)
        _check_states(prefix, self.host.recurrent)
        parts, states = [], []
        for recurrent_layer, state in zip(self.host.recurrent, prefix.states, strict=True):
            device = execution_device(recurrent_layer.module)
            states.append({name: tensor.to(device) for name, tensor in state.items()})
        for layer, key, value in zip(self.host.layers, prefix.keys, prefix.values, strict=True):
            device = execution_device(layer.module)
            parts.append(LayerPrefix(key.to(device), value.to(device), *self._reading))
        return _Held(prefix, parts, states)

    def _assign(self, prefixes: Sequence[KVPrefix | None]) -> None:
        """Row i stands behind `prefixes[i]`; rows behind the same one attend to it together."""
        rows: dict[int, list[int]] = {}
        held: dict[int, _Held] = {}
        for row, prefix in enumerate(prefixes):
            if prefix is not None:
                rows.setdefault(id(prefix), []).append(row)
                if id(prefix) not in held:
                    held[id(prefix)] = self._held.get(id(prefix)) or self._hold(prefix)
        self._held, self._due, self._of_rows = held, list(held.values()), list(prefixes)
        if len(held) == 1 and None not in prefixes:
            self.num_tokens, self._groups = self._due[0].prefix.num_tokens, None
            return
        self.num_tokens = torch.tensor([0 if prefix is None else prefix.num_tokens for prefix in prefixes])
        self._groups = RowGroups.of(list(rows.values()), len(prefixes))

    def check_batch(self, batch_size: int) -> None:
        """
        Raises:
            ValueError: each row has its own prefix, and there are more or fewer rows (0: nobody knows how many).
        """
        if self._of_rows is not None and batch_size and len(self._of_rows) != batch_size:
            raise ValueError(
                f"`shared_prefix` was given {len(self._of_rows)} prefixes, one for each row, and the batch has {batch_size} "
                "rows: give one for each (with beams or several returned sequences, for each of those)."
            )

    def __enter__(self) -> nn.Module:
        if self._state != "new":
            raise RuntimeError(
                f"This `shared_prefix(…)` context is {self._state}: call `shared_prefix` again for another."
            )
        if not self.reusable:
            # The one of now: a model whose cartridge was taken off since is prepared anew.
            self.host = prefix_host(self.model, skip_unsupported=self._holds_nothing)
        self._state = "open"
        self._opener, self._home = generator_that_opens(), thread_and_task()
        self.threads = set(sys._current_frames())  # that were there before
        self.host.open.append(self)
        self.host.count_context(1)
        OPEN.set((*(context for context in OPEN.get() if context in context.host.open), self))
        return self.model

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if self._state != "open":
            return
        self._state, self._opener, self._home = "new" if self.reusable else "closed", None, (0, None)
        self.host.open.remove(self)
        self.host.count_context(-1)
        OPEN.set(tuple(context for context in OPEN.get() if context is not self))

    def holds_here(self) -> bool:
        """Whether the code that runs now is inside: a context that a generator opened holds while that one runs, in
        whatever thread it is asked for its next item.

        Raises:
            RuntimeError: a thread or task got the context of a generator, or of its caller, which look the same.
        """
        told = any(context is self for context in OPEN.get())
        if self._opener is None:
            return told
        if any(frame is self._opener for frame in frames()):
            return True
        if told and self._home != thread_and_task():
            raise RuntimeError(
                "`shared_prefix` was opened by a generator, and the model runs in another thread or task, which cannot "
                "tell whether the generator or its caller started it. Open `shared_prefix` in the function that the "
                "thread or task runs; without a prefix, run it in a `contextvars.Context()` of its own."
            )
        return False

    def warn_of_suspension(self) -> None:
        if self._opener is None or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"A model runs without the prefix that the generator `{self._opener.f_code.co_name}` opened: it holds inside of "
            "the generator alone. If it is for the generator's caller, make it a context manager "
            "(`contextlib.contextmanager`).",
            RuntimeWarning,
            stacklevel=2,
        )

    def parts(self, layer: int, module: nn.Module, query: Tensor) -> Sequence[LayerPrefix]:
        found = []
        if self._groups is not None and self._due:
            self._groups = self._groups.to(query.device)
        for number, held in enumerate(self._due):
            if not held.parts or not held.prefix.num_tokens:
                continue
            part = held.parts[layer]
            key, value = (tensor.to(query.device, query.dtype) for tensor in (part.key, part.value))
            if self.host.layers[layer].expands:
                key, value = expand_tokens(module, key, value)
            group = None if self._groups is None else (self._groups, number)
            found.append(LayerPrefix(key, value, part.path, part.window, group=group))
        return found

    def state(self, layer: int, module: nn.Module) -> Mapping[str, Tensor] | None:
        states = [held.states[layer] for held in self._due if held.states]
        if not states:
            return None
        if self._of_rows is None:
            return states[0]
        none = {name: torch.zeros_like(tensor) for name, tensor in states[0].items()}  # that of no text
        of_rows = [none if prefix is None else self._held[id(prefix)].states[layer] for prefix in self._of_rows]
        return {name: torch.stack([state[name] for state in of_rows]) for name in none}


class PrefixesOfRows(SharedPrefix):
    """As `shared_prefix` with a prefix for each row, for rows that come and go: it can be entered again and again, and the
    rows' prefixes can be others in each forward. What `assign` got last is kept on the layers' devices."""

    reusable = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, [])

    def assign(self, prefixes: Sequence[KVPrefix | None]) -> None:
        """Row i stands behind `prefixes[i]` from now on."""
        self._assign(prefixes)


def shared_prefix(
    model: nn.Module,
    prefix: KVPrefix | Sequence[KVPrefix | None],
    *,
    attention: AttentionPath = "auto",
    sliding_window: WindowReading = "windowed",
    verify: bool = False,
) -> SharedPrefix:
    """Makes every row of every batch attend to `prefix`, in `forward` and `generate`, without copying it per row.

    The result is that of passing the prefix as `past_key_values` to every row (`KVPrefix.to_cache`), with positions
    and padding taken care of: positions come from `position_ids`, or from attention mask and cache. Contexts nest, in
    any order of closing: each adds its prefix, and inside an active cartridge they add to the cartridge. Recurrent layers
    begin from the prefix's state, each row behind its own padding; they begin from one, so two prefixes with states do not
    nest.

    It holds for the code inside the `with`, and for no other: threads and async tasks each have their own, and a
    generator's is not its caller's. A thread that is started inside has to be told:
    `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=…)`.

    Args:
        model: A transformers causal LM, or a PEFT model around one.
        prefix: Keys, values and states made by the same model; see `KVPrefix.from_text`. Or one for each row of a batch,
            `None` for a row that has none: rows behind the same one share it.
        attention: `auto` (fast), `merged` or `concatenated` (the plain reference, for debugging).
        sliding_window: In sliding-window layers, whether prefix tokens leave the window as any token does (`windowed`,
            as `past_key_values` would) or stay in sight (`pinned`).
        verify: Whether the first forward is computed once more with the prefix as `past_key_values` of every row, and the
            final hidden states are held against those.

    ```python
    prefix = KVPrefix.from_text(model, tokenizer, document)
    with shared_prefix(model, prefix):
        model.generate(**tokenizer(questions, padding=True, return_tensors="pt"))
    ```

    Raises:
        ValueError: `prefix` was made by a model of another shape. In a forward: there are prefixes for another number of
            rows.
        UnsupportedModelError: the model has layers that cannot hold a prefix.
            In a forward, with `verify`: the results differ.
        RuntimeError: in a forward, if a layer did not attend to the prefix.
    """
    if verify and not isinstance(prefix, KVPrefix):
        raise ValueError("`verify=True` compares with one prefix of all rows: give one `KVPrefix`.")
    if verify and sliding_window != "windowed":
        raise ValueError('`verify=True` compares with `past_key_values`, which only the reading "windowed" is like.')
    return SharedPrefix(model, prefix, attention, sliding_window, verify)


def positions_from(model: nn.Module, position: int) -> SharedPrefix:
    """A context in which the model's first token stands at `position`, with nothing in front of it."""
    return SharedPrefix(model, position)


def _check_prefix(prefix: KVPrefix, layers: Sequence[AttentionLayer]) -> None:
    have = [(key.shape[0], key.shape[2], value.shape[2]) for key, value in zip(prefix.keys, prefix.values, strict=True)]
    want = [layer.shape for layer in layers]
    if have == want:
        return
    if len(have) != len(want):
        difference = f"{len(have)} layers, the model {len(want)}"
    else:
        index = next(i for i, pair in enumerate(zip(have, want, strict=True)) if pair[0] != pair[1])
        difference = (
            f"(num_key_value_heads, key_dim, value_dim) = {have[index]} in layer {index}, "
            f"`{layers[index].name}` {want[index]}"
        )
    raise ValueError(f"`prefix` was made by another model: it has {difference}.")


def _check_states(prefix: KVPrefix, layers: Sequence[RecurrentLayer]) -> None:
    if len(prefix.states) != len(layers):
        raise ValueError(
            f"`prefix` has the states of {len(prefix.states)} recurrent layers, the model has {len(layers)}: it was made by "
            "another model, or without its states."
        )
    for layer, state in zip(layers, prefix.states, strict=True):
        have = {name: tuple(tensor.shape) for name, tensor in state.items()}
        want = {name: kept.shape for name, kept in layer.states.items()}
        if have != want:
            raise ValueError(f"`prefix` was made by another model: it has the state {have}, `{layer.name}` has {want}.")
