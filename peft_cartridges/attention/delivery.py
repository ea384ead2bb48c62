"""How prefixes reach the layers of a model: which are due is said by the context that the model runs in.

A model is prepared once (`prefix_host`): its attention modules look up their attention function through a `ConfigView`,
the forward of its recurrent modules is asked from which state it begins (`_Beginning`), and its decoder has a hook in front
and one behind. The first asks which prefixes are due to this forward (those of open
`shared_prefix` contexts, and of sources such as a tuner), moves the positions and keeps both in a context variable,
where the attention function finds them; the second sees that every layer took them. While nothing is due, the modules
call what they would have called anyway.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import Cache

from ..kv_prefix import KVPrefix
from ..recurrent import CacheMemory, RecurrentLayer, go_on, goes_on, is_first, run_from_state
from ..recurrent.rows import RowPlan, plan_rows
from .config_view import ConfigView
from .interface import SHARED_PREFIX, LayerPrefix
from .positions import positions_behind
from .probe import (
    AttentionLayer,
    base_model,
    cache_parameter,
    find_attention_layers,
    find_recurrent_layers,
    get_decoder,
)
from .verification import Unverified, find_unverified, verify_rows

_HOST = "_kv_prefix_host"


class DuePrefix(Protocol):
    """A prefix that is due to one forward."""

    @property
    def num_tokens(self) -> int | Tensor:
        """How many tokens stand in front of the rows: one number, or one for each row (`[batch]`)."""

    def parts(self, layer: int, module: nn.Module, query: Tensor) -> Sequence[LayerPrefix]:
        """What the `layer`-th attention layer is to attend to; `module` is the one that asks, `query` its queries."""

    def state(self, layer: int, module: nn.Module) -> Mapping[str, Tensor] | None:
        """What the `layer`-th recurrent layer is to begin from, by name, `[*shape]` for all rows or `[batch, *shape]`;
        `None` for its own beginning. Asked for the first forward of a sequence, and for none that goes on with a cache."""


class OpenPrefix(DuePrefix, Protocol):
    """A prefix that is due for as long as a context is open; see `contexts.py`."""

    host: PrefixHost
    threads: set[int]
    unverified: KVPrefix | None

    def holds_here(self) -> bool:
        """Whether the code that runs now is inside the context."""

    def check_batch(self, batch_size: int) -> None:
        """Raises a `ValueError` if a forward's rows are not those that the context is for."""

    def warn_of_suspension(self) -> None:
        """Says once that the generator that opened the context is suspended, and so not inside, if one did."""


class PrefixSource(Protocol):
    """What has prefixes for a model for as long as it is among its host's sources: a tuner."""

    def is_due(self) -> bool:
        """Whether a forward now would get any."""

    def due(self, batch_size: int, continues: bool) -> Sequence[DuePrefix]:
        """The prefixes due to a forward of `batch_size` rows; `continues` says that it goes on with rows whose first
        tokens came with the same prefixes (a decoding step)."""


class _Forward:
    """One forward of a decoder with prefixes due."""

    def __init__(self, host: PrefixHost, due: Sequence[DuePrefix], positions: Tensor | None) -> None:
        self.host = host
        self.due = due
        self.positions = positions
        self.taken: set[int] = set()
        self.begun: set[int] = set()  # recurrent layers
        self.is_first = True  # of its sequence, as far as the model's arguments say
        self.mask: Any = None
        self.plans: dict[int, tuple[Tensor | None, RowPlan | None]] = {}
        self.compiled = False  # layers that run compiled do not tell that they took it
        self.before: _Forward | None = None
        self.unverified: Unverified | None = None


# Set while a decoder's forward runs, and again while a part of it is computed once more in a backward.
_FORWARD: ContextVar[_Forward | None] = ContextVar("kv_prefix_forward", default=None)
# The padding that a model was told of whose decoder is not (RWKV).
_PADDING: ContextVar[Any] = ContextVar("kv_prefix_padding", default=None)
# The open contexts of this thread or task.
OPEN: ContextVar[tuple[OpenPrefix, ...]] = ContextVar("kv_prefix_open", default=())


class PrefixHost:
    """A model that is prepared for prefixes.

    Args:
        model: A transformers model.
        layers: Its attention layers.
        recurrent: Its recurrent layers.
    """

    def __init__(self, model: Any, layers: Sequence[AttentionLayer], recurrent: Sequence[RecurrentLayer] = ()) -> None:
        self.layers = tuple(layers)
        self.recurrent = tuple(recurrent)
        self.decoder = get_decoder(model)
        self.cache_parameter = cache_parameter(self.decoder)
        self.parameters = list(inspect.signature(self.decoder.forward).parameters)
        self.sources: list[PrefixSource] = []
        # Contexts that are open anywhere, in whatever thread: what a compiled graph can depend on.
        self.contexts = 0
        self.open: list[OpenPrefix] = []
        self._lock = threading.Lock()
        self._running: list[_Forward] = []
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()  # that a forward has filled
        # What compiled code reads in place of the context variable, which cannot be traced.
        self.traced: _Forward | None = None
        self.crowded = False
        self.checkpointing = [m for m in self.decoder.modules() if hasattr(m, "gradient_checkpointing")]
        self.modules = [(index, module) for index, layer in enumerate(self.layers) for module in layer.modules]
        for number, (index, module) in enumerate(self.modules):
            module._kv_prefix_place = (self, index, number)
            module.config = ConfigView(module.config, self.implementation)
        for index, recurrent_layer in enumerate(self.recurrent):
            recurrent_layer.module.forward = _Beginning(self, index, recurrent_layer.module.forward)
        self.hooks = [
            self.decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            self.decoder.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        if model is not self.decoder and any(not isinstance(x.memory, CacheMemory) for x in self.recurrent):
            self.hooks += [
                model.register_forward_pre_hook(self._note_padding, with_kwargs=True),
                model.register_forward_hook(self._forget_padding, always_call=True),
            ]
        self.decoder.__dict__[_HOST] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixHost:
        if id(self.decoder) not in memo and any(id(module) in memo for _, module in self.modules):
            return self  # a layer is copied by itself: it stays one of this model's
        twin: PrefixHost = object.__new__(PrefixHost)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """A copied model is prepared like the model, with nothing open."""
        return {
            **self.__dict__,
            "_lock": None,
            "_running": [],
            "_caches": None,
            "contexts": 0,
            "open": [],
            "traced": None,
            "crowded": False,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _caches=weakref.WeakSet())

    def remove(self) -> None:
        """The model as it was. Sources and open contexts lose their effect."""
        for hook in self.hooks:
            hook.remove()
        for _, module in self.modules:
            module.config = module.config._kv_prefix_view[0]
            del module._kv_prefix_place
        for layer in self.recurrent:
            beginning = layer.module.__dict__["forward"]
            if isinstance(beginning, _Beginning):
                beginning.restore(layer.module)
            else:  # something else wrapped it since
                beginning.host = None
        del self.decoder.__dict__[_HOST]

    def count_context(self, change: int) -> None:
        """A context that prefixes depend on was opened (1) or closed (-1), in whatever thread."""
        with self._lock:
            self.contexts += change

    # -- what is due -------------------------------------------------------------------------------------------------

    def is_due(self) -> bool:
        """Whether a forward of the model would get prefixes."""
        return any(source.is_due() for source in self.sources) or (self.contexts > 0 and bool(self._open_here()))

    def _open_here(self) -> list[OpenPrefix]:
        here = [context for context in tuple(self.open) if context.holds_here()]
        if not here and not OPEN.get():
            self._warn_of_untold_threads()
        for context in OPEN.get() if not here else ():
            if context.host is self:
                context.warn_of_suspension()
        return here

    def _warn_of_untold_threads(self) -> None:
        thread = threading.get_ident()
        for context in tuple(self.open):
            if thread not in context.threads:
                context.threads.add(thread)
                warnings.warn(
                    "A model runs without a prefix in a thread that was started while `shared_prefix` was open in another "
                    "one. If it is to have it, start the thread with "
                    "`Thread(target=contextvars.copy_context().run, args=(function, …))`.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _due(self, batch_size: int, continues: bool, contexts: bool) -> list[DuePrefix]:
        due = [prefix for source in self.sources for prefix in source.due(batch_size, continues)]
        for context in (here := self._open_here() if contexts else []):
            context.check_batch(batch_size)
        return [*due, *here]

    def implementation(self) -> str | None:
        """The attention function that the model's attention modules are to call now; `None` for their own."""
        if torch.compiler.is_compiling():
            return None if self.traced is None else SHARED_PREFIX
        forward = _FORWARD.get()
        if forward is not None and forward.host is self:
            return SHARED_PREFIX
        return SHARED_PREFIX if self.is_due() else None

    def current_forward(self) -> _Forward:
        """The forward that an attention module of this model runs in."""
        if torch.compiler.is_compiling():
            if self.crowded or self.traced is None:
                raise RuntimeError("Compiled layers cannot run in several threads at once while prefixes are due.")
            if not self.traced.compiled:
                self.traced.compiled = True
            return self.traced
        forward = _FORWARD.get()
        if forward is not None and forward.host is self:
            return forward
        if torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                f"An attention module of {type(self.decoder).__name__} was called by itself while a prefix is due to the "
                "model. Call the whole model, which knows where its tokens stand; or close the prefix first."
            )
        # A checkpointed layer that is computed again in a backward, by a checkpointing that is not the model's own.
        return _Forward(self, self._due(0, False, True), None)

    # -- recurrent layers --------------------------------------------------------------------------------------------

    def begin(self, index: int, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Runs a recurrent module from the state that is due to it."""
        layer, running = self.recurrent[index], self.current_forward()
        # A model may read a long text in pieces within one forward. A layer that is computed again is not that.
        again = index in running.begun and not torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            running.begun.add(index)
        if goes_on(layer, arguments, running.is_first and not again):
            return go_on(layer, forward, arguments, lambda: self._plan(layer, running, arguments))
        if not (states := [s for due in running.due if (s := due.state(index, layer.module)) is not None]):
            return forward(**arguments)
        if len(states) > 1:
            raise ValueError(
                f"{len(states)} prefixes are due that each have a state for `{layer.name}`, and a layer begins from one: the "
                "state of two texts does not follow from that of each. Read the texts as one."
            )
        return run_from_state(layer, forward, arguments, states[0], self._plan(layer, running, arguments))

    def _plan(self, layer: RecurrentLayer, running: _Forward, arguments: dict[str, Any]) -> RowPlan | None:
        """The texts in the rows: the same for all layers of a forward that are told of the same padding."""
        batch_size, q_len = arguments[layer.parameters[0]].shape[:2]
        mask = next((value for name, value in arguments.items() if "mask" in name and isinstance(value, Tensor)), None)
        mask = mask if any("mask" in name for name in layer.parameters) else running.mask
        if id(mask) not in running.plans:
            plan = plan_rows(mask, batch_size, q_len, running.positions, arguments.get("cu_seq_lens_q"))
            running.plans[id(mask)] = (mask, plan)  # with the mask, so that its id stays its own
        return running.plans[id(mask)][1]

    def _note_padding(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(inspect.signature(model.forward).parameters, args, strict=False))
        _PADDING.set({**named, **kwargs}.get("attention_mask"))

    def _forget_padding(self, model: nn.Module, args: Any, output: Any) -> None:
        _PADDING.set(None)

    # -- the decoder's hooks -----------------------------------------------------------------------------------------

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() and not self.contexts:
            return self._begin(args, kwargs, contexts=False)
        return self._begin_in_context(args, kwargs)

    @torch.compiler.disable
    def _begin_in_context(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._begin(args, kwargs, contexts=self.contexts > 0)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, contexts: bool) -> Any:
        if not torch.compiler.is_compiling():
            self._drop_interrupted()
        inputs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        if tokens is None:
            return None
        due = self._due(tokens.shape[0], self._continues(inputs, tokens), contexts)
        if contexts and inputs.get("cache") is not None and not any(prefix in self.open for prefix in due):
            raise RuntimeError(
                "`generate_batch` runs the model in a thread of its own, where an open `shared_prefix` does not hold. Put "
                "the prefix into a cartridge (`get_peft_model`, `set_kv_prefix`), or close the context."
            )
        if not due:
            return None
        positions = None
        if "position_ids" in self.parameters:
            positions = positions_behind(
                inputs, tokens, functools.reduce(operator.add, [prefix.num_tokens for prefix in due])
            )
        forward = _Forward(self, due, positions)
        forward.mask = inputs.get("attention_mask")
        if forward.mask is None and len(self.hooks) > 2:
            forward.mask = _PADDING.get()
        forward.is_first = is_first(inputs.get(self.cache_parameter))
        if torch.compiler.is_compiling():
            self.traced = forward
        else:
            forward.unverified = find_unverified(due, inputs, tokens, inputs.get(self.cache_parameter))
            forward.before = _FORWARD.get()
            _FORWARD.set(forward)
            with self._lock:
                self._running.append(forward)
                self.traced, self.crowded = forward, len(self._running) > 1
            self._carry_into_recomputation(due)
        if positions is None:
            return None
        if "position_ids" in self.parameters[: len(args)]:
            index = self.parameters.index("position_ids")
            return (*args[:index], positions, *args[index + 1 :]), kwargs
        return args, {**kwargs, "position_ids": positions}

    def _continues(self, inputs: dict[str, Any], tokens: Tensor) -> bool:
        """Whether this is a step behind an earlier forward into the same cache."""
        cache = inputs.get(self.cache_parameter)
        if not isinstance(cache, Cache) or torch.compiler.is_compiling():
            return False
        known = cache in self._caches
        self._caches.add(cache)
        return known and tokens.shape[1] == 1 and cache.is_initialized

    def after(self, decoder: Any, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self.traced = None
            return
        forward = _FORWARD.get()
        if forward is None or forward.host is not self:
            return
        self._end(forward)
        if output is not None and not forward.compiled:  # there is none after an error
            self._check_taken(forward)
        if output is not None and forward.unverified is not None:
            prefix, forward.unverified.context.unverified = forward.unverified.context.unverified, None
            held = OPEN.set(tuple(context for context in OPEN.get() if context is not forward.unverified.context))
            self.open.remove(forward.unverified.context)
            try:
                by_token = any(getattr(layer.memory, "aid", None) for layer in self.recurrent)
                verify_rows(self.decoder, prefix, forward.unverified, output.last_hidden_state, by_token=by_token)
            finally:
                self.open.append(forward.unverified.context)
                OPEN.reset(held)

    def _end(self, forward: _Forward) -> None:
        _FORWARD.set(forward.before)
        with self._lock:
            self._running = [other for other in self._running if other is not forward]
            self.traced = self._running[-1] if self._running else None
            self.crowded = len(self._running) > 1

    def _drop_interrupted(self) -> None:
        """After a `KeyboardInterrupt` PyTorch calls no hook, and a forward is left that never ended."""
        while (forward := _FORWARD.get()) is not None and forward.host is self:
            self._end(forward)

    def _check_taken(self, forward: _Forward) -> None:
        if self.decoder.training and getattr(self.decoder, "layerdrop", 0):
            return
        # A model that leaves early has its number of layers lowered for a while.
        num_layers = getattr(self.decoder.config, "num_hidden_layers", len(self.layers))
        for number, (index, module) in enumerate(self.modules):
            if number not in forward.taken and self.layers[index].layer_idx < num_layers:
                raise RuntimeError(
                    f"A prefix was due, but `{self.layers[index].name}` ({type(module).__name__}) did not attend to it: "
                    "the module was replaced, or no longer calls the attention function that its configuration names."
                )
        for index, layer in enumerate(self.recurrent):
            if index not in forward.begun and layer.layer_idx < num_layers:
                raise RuntimeError(
                    f"A prefix was due, but `{layer.name}` ({type(layer.module).__name__}) did not begin from its state: the "
                    "module or its forward was replaced."
                )

    def _carry_into_recomputation(self, due: Sequence[DuePrefix]) -> None:
        """Checkpointed layers are computed again in the backward, in whatever context and thread that runs in."""
        for module in self.checkpointing:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if module.gradient_checkpointing and function is not None:
                module._gradient_checkpointing_func = self._carrying(function)
        if torch.is_grad_enabled() and any(prefix in self.open for prefix in due):
            for module in self.decoder.modules():  # as FSDP's checkpointing wraps them, at any time
                if isinstance(module, CheckpointWrapper):
                    module.checkpoint_fn = self._carrying(module.checkpoint_fn)  # type: ignore[assignment]

    def _carrying(self, checkpoint: Callable[..., Any]) -> _Carrying:
        if not isinstance(checkpoint, _Carrying):
            return _Carrying(checkpoint, self)
        return checkpoint if checkpoint.host is self else _Carrying(checkpoint.checkpoint, self)


class _Beginning:
    """The forward of a recurrent module, which begins from a prefix's state where one is due."""

    def __init__(self, host: PrefixHost, index: int, forward: Callable[..., Any]) -> None:
        self.host: PrefixHost | None = host
        self.index = index
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.host is None or self.host.implementation() is None:
            return self.forward(*args, **kwargs)
        return self.host.begin(self.index, self.forward, self.host.recurrent[self.index].arguments(args, kwargs))

    def restore(self, module: nn.Module) -> None:
        """The module's forward as it was."""
        if getattr(self.forward, "__func__", None) is type(module).forward:
            del module.__dict__["forward"]
        else:
            module.forward = self.forward


class _Carrying:
    """A checkpoint function that computes again with what was due the first time."""

    def __init__(self, checkpoint: Callable[..., Any], host: PrefixHost) -> None:
        self.checkpoint = checkpoint
        self.host = host

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # computed again within the graph
            if self.host.traced is not None:
                self.host.traced.compiled = True  # here, as nothing may be changed inside of what is checkpointed
            return self.checkpoint(function, *args, **kwargs)
        forward = _FORWARD.get()
        if forward is None:
            return self.checkpoint(function, *args, **kwargs)

        def within(*inner_args: Any, **inner_kwargs: Any) -> Any:
            host = forward.host
            held, traced = _FORWARD.set(forward), host.traced
            host.traced = forward
            try:
                return function(*inner_args, **inner_kwargs)
            finally:
                _FORWARD.reset(held)
                host.traced = traced

        return self.checkpoint(within, *args, **kwargs)


def prefix_host(model: nn.Module, *, skip_unsupported: bool = False) -> PrefixHost:
    """The host of a model, which is prepared on the first call; an `UnsupportedModelError` if its layers cannot hold a
    prefix."""
    model = base_model(model)
    layers = find_attention_layers(model, skip_unsupported=skip_unsupported)
    recurrent = find_recurrent_layers(model, skip_unsupported=skip_unsupported)
    modules = [*(layer.module for layer in layers), *(layer.module for layer in recurrent)]
    host: PrefixHost | None = get_decoder(model).__dict__.get(_HOST)
    if host is not None and [*(x.module for x in host.layers), *(x.module for x in host.recurrent)] != modules:
        host.remove()  # the model's layers were exchanged
        host = None
    return PrefixHost(model, layers, recurrent) if host is None else host


def prefix_is_due(model: nn.Module) -> bool:
    """Whether a forward of `model` here and now would attend to a prefix: a cartridge, or an open `shared_prefix`."""
    host = get_decoder(model).__dict__.get(_HOST)
    return host is not None and host.is_due()
