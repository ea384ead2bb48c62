"""What the layers of a model are, told by the model itself: one token goes through it while every attention module calls
a function that writes down what it is called with, and the cache writes down what is put into it, and by which module.

A layer is known by what it does, so that no architecture needs a list or a name here. What a probe cannot see in one
token (masks that are made from the values, scores with a bias of their own) shows in how the function is called.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from ..kv_prefix import evaluating
from ..recurrent import RecurrentLayer
from ..recurrent.finding import RecordedCalls, find_recurrent_layer
from ..recurrent.own_memory import find_layers_with_own_memory, find_own_memory
from .config_view import ConfigView
from .trial_run import experts_without_weights, inference_untold

_PROBE = "kv_prefix_probe"
_FOUND = "_kv_prefix_layers"


class UnsupportedModelError(ValueError):
    """The model, or a layer of it, cannot hold a prefix; the message names the module and the reason."""


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module that can hold a prefix.

    Args:
        name: Its qualified name in the transformers model.
        module: The module itself.
        layer_idx: Its number among the model's layers, as the module and caches know it.
        num_key_value_heads, key_dim, value_dim: The shape of what it caches for one token.
        expands: Whether it caches something else than it attends to (latent attention), and expands it.
        readers: Names and modules of later layers that have no keys and values of their own and attend to this
            layer's (Gemma 3n, Gemma 4), and so to its prefix.
    """

    name: str
    module: Any
    layer_idx: int
    num_key_value_heads: int
    key_dim: int
    value_dim: int
    expands: bool = False
    readers: tuple[tuple[str, Any], ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_key_value_heads, self.key_dim, self.value_dim

    @property
    def modules(self) -> tuple[Any, ...]:
        """All modules that attend to this layer's keys and values."""
        return (self.module, *(module for _, module in self.readers))


@dataclass(frozen=True)
class ProbedModel:
    """What a probe found.

    Args:
        decoder: The module that is given tokens and positions.
        layers: The attention layers that can hold a prefix, by layer index.
        recurrent: The recurrent layers that can begin from a prefix's state, by layer index.
        left_out: Why the other layers, if any, cannot; `None` where all can.
    """

    decoder: Any
    layers: tuple[AttentionLayer, ...]
    recurrent: tuple[RecurrentLayer, ...] = ()
    left_out: str | None = None


def base_model(model: Any) -> Any:
    """The transformers model inside wrappers of PEFT, `torch.compile` and distributed training."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def probe(model: nn.Module) -> ProbedModel:
    """Finds the attention layers of a decoder; a model is probed once, and again if its layers were exchanged.

    Args:
        model: A transformers causal LM, or a PEFT model around one.

    Raises:
        UnsupportedModelError: the model is no decoder with attention that can hold a prefix.
    """
    model = base_model(model)
    found: ProbedModel | None = model.__dict__.get(_FOUND)
    if found is None or not _still_holds(found, model):
        with _LOCK:
            found = _probe(model)
        model.__dict__[_FOUND] = found
    return found


def _still_holds(found: ProbedModel, model: Any) -> bool:
    modules = set(model.modules())
    held = [
        *(module for layer in found.layers for module in layer.modules),
        *(layer.module for layer in found.recurrent),
    ]
    return all(module in modules for module in held)


def find_attention_layers(model: nn.Module, *, skip_unsupported: bool = False) -> list[AttentionLayer]:
    """The attention layers of a decoder that keep keys and values of their own, ordered by layer index; none in a model
    that is recurrent throughout.

    Args:
        model: A transformers causal LM, or a PEFT model around one.
        skip_unsupported: Leave out layers that can hold nothing of a prefix instead of refusing them.

    Raises:
        UnsupportedModelError: the model is no decoder, or a layer of it can hold nothing of a prefix.
    """
    return list(_supported(model, skip_unsupported).layers)


def find_recurrent_layers(model: nn.Module, *, skip_unsupported: bool = False) -> list[RecurrentLayer]:
    """The layers of a decoder that keep a state of fixed size (linear attention, state spaces, convolutions), ordered by
    layer index; arguments and errors as of `find_attention_layers`."""
    return list(_supported(model, skip_unsupported).recurrent)


def _supported(model: nn.Module, skip_unsupported: bool) -> ProbedModel:
    found = probe(model)
    if found.left_out is not None and not skip_unsupported:
        raise UnsupportedModelError(found.left_out)
    return found


def get_decoder(model: nn.Module) -> Any:
    """The module inside `model` that is given tokens and positions, and gives the final hidden states."""
    return probe(model).decoder


def cache_parameter(model: nn.Module) -> str:
    """What a model's or decoder's forward calls the cache."""
    parameters = inspect.signature(model.forward).parameters
    return next(
        (name for name in ("past_key_values", "cache_params", "state") if name in parameters), "past_key_values"
    )


def find_decoder(model: nn.Module, layers: Iterable[AttentionLayer | RecurrentLayer]) -> tuple[str, nn.Module]:
    """Name and module of the innermost model around `layers` that takes tokens and positions: decoder layers may take
    positions too, but no tokens. Around recurrent layers alone it need not take positions.

    Raises:
        UnsupportedModelError: no module around the layers takes `position_ids`.
    """
    layers = list(layers)
    names = [layer.name for layer in layers]
    attends = any(isinstance(layer, AttentionLayer) for layer in layers)
    around = []
    for name, module in model.named_modules():
        inside = f"{name}." if name else ""
        if all(layer.startswith(inside) for layer in names):
            parameters = inspect.signature(module.forward).parameters
            takes_tokens = "input_ids" in parameters or "inputs_embeds" in parameters
            if takes_tokens and ("position_ids" in parameters or not attends):
                around.append((name, module))
    if not around:
        raise UnsupportedModelError(
            f"No module of {type(model).__name__} around its attention layers takes `position_ids`, which a prefix has "
            "to shift (models with ALiBi or other relative biases are not supported)."
        )
    return max(around, key=lambda named: named[0].count(".") + bool(named[0]))


def get_text_config(model: nn.Module) -> Any:
    """The configuration of the language model (of the text part, in a vision–language model).

    Raises:
        UnsupportedModelError: `model` is not a transformers model.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"`model` is a {type(model).__name__} without a transformers configuration: pass a transformers causal LM."
        )
    return config.get_text_config(decoder=True)


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` computes: also where accelerate keeps its weights elsewhere (offloaded, then on `meta`)."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    devices = (tensor.device for tensor in (*module.parameters(), *module.buffers()))
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


# -- the probe -------------------------------------------------------------------------------------------------------

_LOCK = threading.Lock()


@dataclass
class _Call:
    """One call of an attention function."""

    module: Any
    key: Tensor
    value: Tensor
    mask: Any
    arguments: dict[str, Any]
    update: _Update | None


@dataclass
class _Update:
    """One entry into the cache, and what the cache gave back."""

    layer_idx: int
    key: Tensor
    value: Tensor
    shape: tuple[int, int, int]
    taken: bool = False


@dataclass
class _Record:
    calls: list[_Call] = field(default_factory=list)
    updates: list[_Update] = field(default_factory=list)
    recurrent: RecordedCalls = field(default_factory=RecordedCalls)


_RECORD: ContextVar[_Record | None] = ContextVar("kv_prefix_probe", default=None)


class _RecordingCache(DynamicCache):
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        shape = (key_states.shape[1], key_states.shape[3], value_states.shape[3])
        key, value = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        record = _RECORD.get()
        assert record is not None
        record.updates.append(_Update(layer_idx, key, value, shape))
        return key, value

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        record = _RECORD.get()
        assert record is not None
        record.recurrent.keeps(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        record = _RECORD.get()
        assert record is not None
        record.recurrent.keeps(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)


def _record_call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *_: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """In place of attention: one token attends to itself."""
    record = _RECORD.get()
    assert record is not None
    update = next((update for update in record.updates if not update.taken), None)
    if update is not None:
        update.taken = True
    record.calls.append(_Call(module, key, value, attention_mask, arguments, update))
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_PROBE, _record_call)


def _probe(model: Any) -> ProbedModel:
    config = get_text_config(model)
    _refuse_other_models(model, config)
    if find_own_memory(model) is not None:
        own = find_layers_with_own_memory(model, _one_token(model, config))
        return ProbedModel(find_decoder(model, own)[1], (), tuple(own))
    record, cache = _run(model, config)
    names = {module: name for name, module in model.named_modules()}
    calls = [call for call in record.calls if call.module in names]
    layers: list[AttentionLayer] = []
    readers: dict[int, list[tuple[str, Any]]] = {}
    for call in calls:
        name = names[call.module]
        _refuse_call(name, call, cache)
        update = call.update
        if update is None:
            source = next((u for u in reversed(record.updates) if _same(u.key, call.key)), None)
            if source is None:
                raise _cannot(name, call.module, "it attends to keys that it does not keep in the cache")
            readers.setdefault(source.layer_idx, []).append((name, call.module))
            continue
        expands = hasattr(call.module, "expand_kv") and not _same(update.key, call.key)
        if not expands and not (_same(update.key, call.key) and _same(update.value, call.value)):
            raise _cannot(name, call.module, "its keys and values are rearranged between the cache and the attention")
        layers.append(AttentionLayer(name, call.module, update.layer_idx, *update.shape, expands))
    layers = [
        AttentionLayer(
            layer.name,
            layer.module,
            layer.layer_idx,
            *layer.shape,
            layer.expands,
            tuple(readers.get(layer.layer_idx, ())),
        )
        for layer in sorted(layers, key=lambda layer: layer.layer_idx)
    ]
    indices = [layer.layer_idx for layer in layers]
    if len({id(call.module) for call in calls}) < len(calls) or len(set(indices)) < len(indices):
        raise UnsupportedModelError(
            f"{type(model).__name__} attends several times in one layer ({names[calls[0].module]}): it is not one decoder."
        )
    recurrent, reasons = _recurrent_layers(record, cache, names)
    left_out = _left_out(model, config, record, cache, layers, recurrent, reasons)
    if not layers and not recurrent:
        raise UnsupportedModelError(left_out or f"{type(model).__name__} has no attention.")
    decoder = find_decoder(model, [*layers, *recurrent])[1]
    return ProbedModel(decoder, tuple(layers), tuple(recurrent), left_out)


def _recurrent_layers(
    record: _Record, cache: DynamicCache, names: dict[Any, str]
) -> tuple[list[RecurrentLayer], dict[int, str]]:
    """The layers that can begin from a state, and why others cannot."""
    found, reasons = [], {}
    for layer_idx, calls in sorted(record.recurrent.of_layers.items()):
        layer = find_recurrent_layer(layer_idx, calls, cache.layers[layer_idx], names)
        if isinstance(layer, RecurrentLayer):
            found.append(layer)
        else:
            reasons[layer_idx] = layer
    return found, reasons


def _refuse_other_models(model: Any, config: Any) -> None:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"`model` is an encoder–decoder ({name}): a prefix of keys and values stands in front of a decoder-only "
            "language model's tokens. Use a causal LM (`AutoModelForCausalLM`)."
        )
    if cache_parameter(model) not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{name} takes no `past_key_values`: it keeps no keys and values of the tokens before, which a prefix is made of."
        )
    types = getattr(config, "layer_types", None) or []
    if "chunked_attention" in types:
        raise UnsupportedModelError(
            f"{name} has chunked-attention layers (layer {types.index('chunked_attention')}), where tokens of a later "
            "chunk never see an earlier one: a prefix has no meaning there."
        )


def _run(model: Any, config: Any) -> tuple[_Record, DynamicCache]:
    """One token through the model."""
    record = _Record()
    viewed = [
        module
        for module in model.modules()
        if not isinstance(module, PreTrainedModel) and hasattr(module.__dict__.get("config"), "_attn_implementation")
    ]
    cache = _RecordingCache(config=config)
    configs = [module.config for module in viewed]
    token = _one_token(model, config)
    on_meta = token.is_meta
    held = _RECORD.set(record)
    try:
        for module, own in zip(viewed, configs, strict=True):
            module.config = ConfigView(own, lambda: _PROBE if _RECORD.get() is not None else None)
        recorded = record.recurrent.of(model, cache)
        with evaluating(model), experts_without_weights(model, on_meta), inference_untold(model), recorded:
            model(
                input_ids=token,
                use_cache=True,
                **{cache_parameter(model): cache},
            )
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} could not be probed for its attention layers: one token through it gave "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for module, own in zip(viewed, configs, strict=True):
            module.config = own
        _RECORD.reset(held)
    return record, cache


def _one_token(model: Any, config: Any) -> Tensor:
    """An ordinary token `[1, 1]`, where the model takes it."""
    special = {value for name, value in vars(model.config).items() if name.endswith(("_token_id", "_token_index"))}
    token = next(token for token in range(7, 10**6) if token not in special)
    embeddings = model.get_input_embeddings()
    on_meta = next(embeddings.parameters()).is_meta and not hasattr(embeddings, "_hf_hook")
    device = "meta" if on_meta else execution_device(embeddings)
    return torch.full((1, 1), min(token, config.vocab_size - 1), device=device)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))


def _cannot(name: str, module: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"`{name}` ({type(module).__name__}) cannot hold a prefix: {reason}.")


def _refuse_call(name: str, call: _Call, cache: DynamicCache) -> None:
    module, arguments = call.module, call.arguments
    if not (getattr(module, "is_causal", True) and arguments.get("is_causal") is not False):
        raise _cannot(name, module, "it is not causal")
    if arguments.get("position_bias") is not None:
        raise _cannot(name, module, "it adds a bias of relative positions to its scores, which a prefix has none of")
    if isinstance(call.mask, Tensor) and call.mask.ndim == 4 and call.mask.shape[1] > 1:
        raise _cannot(name, module, "it makes a mask of its own for each head, which a prefix would have none of")
    if call.update is None:
        return
    kind = cache.layers[call.update.layer_idx]
    allowed = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(kind) not in allowed and not isinstance(kind, LinearAttentionCacheLayerMixin):
        raise _cannot(
            name,
            module,
            f"it keeps more of a text than keys and values ({type(kind).__name__}), and has none of a prefix's",
        )
    if isinstance(kind, DynamicSlidingWindowLayer) and not arguments.get("sliding_window"):
        raise UnsupportedModelError(
            f"`{name}` ({type(module).__name__}) does not tell its sliding window ({kind.sliding_window}) to its "
            "attention function. If your texts are shorter than that, set `model.config.sliding_window = None`."
        )


def _left_out(
    model: Any,
    config: Any,
    record: _Record,
    cache: DynamicCache,
    layers: list[AttentionLayer],
    recurrent: list[RecurrentLayer],
    reasons: dict[int, str],
) -> str | None:
    """Why some layers cannot hold a prefix."""
    types = getattr(config, "layer_types", None) or []
    hint = ' `CartridgeConfig(recurrent_state="skip")` leaves them out.' if layers else ""
    if reasons:
        return f"{type(model).__name__}: {next(iter(reasons.values()))}.{hint}"
    found = {layer.layer_idx for layer in layers} | {layer.layer_idx for layer in recurrent}
    num_readers = sum(len(layer.readers) for layer in layers)
    # By name: transformers has them since 5.23.
    dummies = {index for index, layer in enumerate(cache.layers) if type(layer).__name__ == "DummyLayer"}
    missing = sorted(set(range(config.num_hidden_layers)) - found - dummies)
    if len(missing) <= num_readers and not dummies:
        missing = []  # readers keep no layer of the cache
    if not missing:
        return None
    parent = next(
        (n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers),
        None,
    )
    names = [f"{parent}.{index}" if parent else str(index) for index in missing]
    kinds = sorted({types[index] for index in missing if index < len(types)})
    return (
        f"{type(model).__name__}: the layers {', '.join(names[:8])}{', …' if len(names) > 8 else ''} have no causal "
        "attention through transformers' attention interface, and keep no state in its cache"
        + (f" (layer types: {', '.join(kinds)})" if kinds else "")
        + f", so they cannot hold a prefix.{hint}"
    )
