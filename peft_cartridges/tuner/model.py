"""`CartridgeModel`: the PEFT tuner for cartridges, an adapter inside the attention and recurrent layers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftConfig, PromptLearningConfig
from peft.tuners.cartridge import CartridgeEncoder
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..attention.delivery import DuePrefix, prefix_host
from ..attention.probe import (
    AttentionLayer,
    RecurrentLayer,
    UnsupportedModelError,
    find_attention_layers,
    find_recurrent_layers,
    get_text_config,
)
from ..kv_prefix import KVPrefix
from .buffers import JoinedTokens
from .config import KEYS_AND_VALUES, WITH_STATES, CartridgeConfig
from .due import BASE_ROW, AdapterOfRows, Composition, adapters_of_rows
from .file_format import is_cartridge_tensor, prefix_to_tensors, tensors_to_prefix
from .layer import CartridgeLayer, KeyValueLayer, StateLayer

# The adapter of each row, in this thread or task, and the tuner that it is for.
_ROWS: ContextVar[tuple[Any, tuple[str, ...]]] = ContextVar("kv_prefix_rows", default=(None, ()))

_PARTS = ("kv_prefix_frozen_key", "kv_prefix_key", "kv_prefix_frozen_value", "kv_prefix_value")


class CartridgeModel(BaseTuner):
    """Puts cartridges into the attention layers of a transformers causal LM, keys and values, and into its recurrent
    layers, initial states; made by `get_peft_model`.

    Several active adapters (`set_adapter(["a", "b"])`) are a composition: their prefixes in that order. With
    `adapter_names=[…]` in `forward` or `generate`, each row of the batch has its own (`"__base__"` for none).
    """

    prefix = "kv_prefix_"
    tuner_layer_cls = CartridgeLayer
    # Found on the model itself, see `_prepare_adapter_config`.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT declares it

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # PEFT looks up one class per PEFT type. A stock `peft.CartridgeConfig` still gets the stock prompt encoder.
        if args and isinstance(args[0], PromptLearningConfig):
            return CartridgeEncoder(args[0])
        return super().__new__(cls)

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(peft_config, PeftConfig):
            # PEFT's model classes pass a dictionary; this comes from `inject_adapter_in_model`, after which
            # transformers loads the file by itself, past the hooks that know its format.
            raise ValueError(
                "transformers' own `load_adapter`, `add_adapter` and `from_pretrained` of an adapter do not know the "
                "format of cartridges: load the base model, and use `PeftModel.from_pretrained(model, …)` or "
                "`get_peft_model(model, config)`."
            )
        # Another tuner on the same model (a LoRA) keeps its adapters, and we ours: PEFT would make one dictionary of
        # them, in which two adapters of one name would be one.
        # What becomes of the adapters in a forward; not to be registered as modules.
        self.__dict__.update(_host=None, _layers=[], _states=[], _joined={}, _of_rows={}, _hooks=[])
        beside = getattr(model, "peft_config", None)
        if beside is not None:
            self.peft_config = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            super().__init__(model, peft_config, *args, **kwargs)
        if beside is not None:
            model.peft_config = beside

    # -- injection ---------------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        peft_config.check_window(get_text_config(self.model))
        attention, recurrent = self._find_layers(peft_config)
        shapes = [layer.shape for layer in attention]
        indices = [layer.layer_idx for layer in attention]
        found: dict[str, Any] = {
            "num_layers": len(attention), "layer_shapes": None, "layer_states": None, "layer_format": None
        }  # fmt: skip
        alike = len(set(shapes)) == 1 and shapes[0][1] == shapes[0][2] and indices == list(range(len(attention)))
        if alike and not recurrent:
            heads, head_dim, _ = shapes[0]
            found |= {"token_dim": heads * head_dim, "num_attention_heads": heads}
        else:
            number = 1 + max([layer.layer_idx for layer in attention] + [layer.layer_idx for layer in recurrent])
            by_index = {index: list(shape) for index, shape in zip(indices, shapes, strict=True)}
            found |= {"token_dim": None, "num_attention_heads": None, "layer_format": KEYS_AND_VALUES}
            found["layer_shapes"] = [by_index.get(index) for index in range(number)]
            if recurrent:
                states = {
                    layer.layer_idx: {name: list(state.shape) for name, state in layer.states.items()}
                    for layer in recurrent
                }
                found |= {"layer_states": [states.get(index) for index in range(number)], "layer_format": WITH_STATES}
        for name, value in found.items():
            given = getattr(peft_config, name)
            if given is not None and given != value:
                base = peft_config.base_model_name_or_path
                model_name = getattr(self.model, "name_or_path", "") or "unnamed"
                raise ValueError(
                    f"The cartridge does not fit the model: its `{name}` is {given}, but "
                    f"{type(self.model).__name__} ({model_name}) has {value}. "
                    + (f"Load the base model that it was trained on: {base!r}." if base else "Load its base model.")
                )
            setattr(peft_config, name, value)
        by_module: dict[Any, AttentionLayer | RecurrentLayer] = {layer.module: layer for layer in attention}
        by_module |= {layer.module: layer for layer in recurrent}
        self._found = {
            name.removesuffix(".base_layer"): by_module[module]
            for name, module in self.model.named_modules()
            if module in by_module
        }
        peft_config.target_modules = set(self._found)
        return peft_config

    def _find_layers(self, config: CartridgeConfig) -> tuple[list[AttentionLayer], list[RecurrentLayer]]:
        """The layers that are to hold an adapter.

        Raises:
            UnsupportedModelError: a layer of the model can hold nothing, or none is left by `recurrent_state="skip"`.
            ValueError: `num_tokens` is above 0 and no layer holds tokens, or 0 and no layer holds anything else.
        """
        name, skips = type(self.model).__name__, config.recurrent_state == "skip"
        attention = find_attention_layers(self.model, skip_unsupported=skips)
        recurrent = [] if skips else find_recurrent_layers(self.model)
        if not attention and not recurrent:
            raise UnsupportedModelError(
                f'{name} has no attention layers, and `recurrent_state="skip"` leaves the others out: nothing would hold '
                'the cartridge. Use `recurrent_state="train"`.'
            )
        if not attention and config.num_tokens:
            raise ValueError(
                f"`num_tokens={config.num_tokens}`, but {name} has no attention layers, which keep something of every "
                "token: its cartridge is a state for each layer, of one size. Use `CartridgeConfig(num_tokens=0)`."
            )
        if not recurrent and not config.num_tokens:
            raise ValueError(
                f"`num_tokens=0`, but {name} has no recurrent layers that begin from a state: give at least 1."
            )
        return attention, recurrent

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, CartridgeLayer):
            # PEFT does not look into what it has wrapped before, and a recurrence may lie within an attention (Zaya).
            for name in [name for name in self._found if name.startswith(f"{current_key}.")]:
                # Where a first adapter's is: PEFT, which goes by names, finds the wrapper and not what it wraps.
                place, _, child = name.replace(".base_layer.", ".").rpartition(".")
                outer = self.model.get_submodule(place)
                self._create_and_replace(peft_config, adapter_name, getattr(outer, child), child, outer, name)
        else:
            layer = self._found[current_key]
            target = KeyValueLayer(target, layer) if isinstance(layer, AttentionLayer) else StateLayer(target, layer)
            setattr(parent, target_name, target)
        target.update_layer(adapter_name, peft_config)

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's, for every adapter. A later one may hold states where the first one had none."""
        super().inject_adapter(*args, **kwargs)
        self._joined.clear()
        self._of_rows.clear()
        self._layers[:], self._states[:] = self.cartridge_layers(), self.state_layers()

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if self._host is None:
            self.__dict__["_host"] = host = prefix_host(model, skip_unsupported=True)
            # Another one around the same layers, as in a notebook whose cell is run twice, gives way.
            host.sources[:] = [source for source in host.sources if not isinstance(source, CartridgeModel)]
            host.sources.append(self)
            if isinstance(head := _output_embeddings(model), nn.Module):
                self._hooks.append(head.register_forward_pre_hook(_contiguous_input))

    def cartridge_layers(self) -> list[KeyValueLayer]:
        """The wrapped attention layers, which hold keys and values, ordered by layer index."""
        layers = [module for module in self.model.modules() if isinstance(module, KeyValueLayer)]
        return sorted(layers, key=lambda layer: layer.layer_idx)

    def state_layers(self) -> list[StateLayer]:
        """The wrapped recurrent layers, which hold initial states, ordered by layer index."""
        layers = [module for module in self.model.modules() if isinstance(module, StateLayer)]
        return sorted(layers, key=lambda layer: layer.layer_idx)

    def _unload_and_optionally_merge(  # type: ignore[override] # PEFT's says None, and returns the model too
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        """Takes the cartridges off, and nothing else: a LoRA in the same model stays."""
        if merge:
            next(module for module in self.model.modules() if isinstance(module, CartridgeLayer)).merge()
        for name, module in list(self.model.named_modules()):
            parent, _, child = name.rpartition(".")
            if isinstance(module, CartridgeLayer):
                setattr(self.model.get_submodule(parent), child, module.base_layer)
            elif self._is_ours(module):
                unloaded = module.unload_and_optionally_merge_module(False, False, None)
                setattr(self.model.get_submodule(parent), child, unloaded)
        if getattr(self.model, "peft_config", None) is self.peft_config:
            del self.model.peft_config
        self._leave_host()
        return self.model

    def _leave_host(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        if self._host is not None:
            self._host.sources[:] = [source for source in self._host.sources if source is not self]
            if not self._host.sources and not self._host.contexts:
                self._host.remove()
            self.__dict__["_host"] = None

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter active, or several: a composition, their prefixes in that order. A name given twice counts
        once.

        Raises:
            ValueError: a name is not loaded, none is given, or the adapters read sliding windows differently.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        if not names and self.active_adapters:  # none is active once the last one is deleted
            raise ValueError("`adapter_name` is empty: name at least one adapter, or use `disable_adapter()` for none.")
        for name in names:
            self._check_adapter(name)
        readings = {self._config_of(name).sliding_window for name in names}
        if len(readings) > 1:
            raise ValueError(
                f"The adapters {', '.join(names)} cannot be composed: their `sliding_window` differs "
                f"({', '.join(sorted(readings))}). Set it to the same value in their configurations."
            )
        super().set_adapter(names, inference_mode=inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        # Not PEFT's own, which would also switch a LoRA in the same model.
        for module in self.model.modules():
            if isinstance(module, CartridgeLayer) or self._is_ours(module):
                module.enable_adapters(enabled)

    def _is_ours(self, module: nn.Module) -> bool:
        """Whether a module of `modules_to_save` belongs to cartridges only."""
        return isinstance(module, AuxiliaryTrainingWrapper) and module._adapters <= set(self.peft_config)

    # -- an adapter per row ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("`adapter_names` is for inference: call `model.eval()` first.")
        if unknown := sorted(set(names) - set(self.peft_config) - {BASE_ROW}):
            raise ValueError(f"`adapter_names` has names that are not loaded: {', '.join(unknown)}.")
        assert self._host is not None
        held = _ROWS.set((self, tuple(names)))
        self._host.count_context(1)
        try:
            yield
        finally:
            self._host.count_context(-1)
            _ROWS.reset(held)

    # -- what is due to a forward (see `attention/delivery.py`) ------------------------------------------------------

    def is_due(self) -> bool:
        return any(name in self.peft_config for name in self._names_due())

    def due(self, batch_size: int, continues: bool) -> list[DuePrefix]:
        names = self._names_due()
        if self._rows() is None:
            return [self._composition(names, continues)] if names else []
        in_use = [name for name in dict.fromkeys(names) if name != BASE_ROW]
        key = (names, batch_size)
        of_rows = self._of_rows.get(key) if continues else None  # another thread may clear them
        if of_rows is None:
            compositions = {name: self._composition((name,), continues) for name in in_use}
            of_rows = AdapterOfRows(compositions, adapters_of_rows(names, batch_size))
            self._of_rows.clear()
            self._of_rows[key] = of_rows
        return [of_rows] if in_use else []

    def _rows(self) -> tuple[str, ...] | None:
        if torch.compiler.is_compiling():
            return None
        tuner, names = _ROWS.get()
        return names if tuner is self else None

    def _names_due(self) -> tuple[str, ...]:
        first = (self._layers or self._states)[0]
        if first.disable_adapters:
            return ()
        rows = self._rows()
        return tuple(name for name in first.active_adapters if name in first.adapter_configs) if rows is None else rows

    def _composition(self, names: tuple[str, ...], continues: bool) -> Composition:
        if names not in self._joined:
            self._joined[names] = JoinedTokens(self._layers, self._states, names)
        if not continues:
            self._joined[names].begin()
        return Composition(self._joined[names], [layer.expands for layer in self._host.layers])

    # -- the prefix of an adapter ------------------------------------------------------------------------------------

    def get_kv_prefix(self, adapter_name: str = "default") -> KVPrefix:
        """A copy of an adapter's keys and values, and of the states that recurrent layers begin from."""
        self._check_adapter(adapter_name)
        pairs = [layer.get_tokens(adapter_name) for layer in self.cartridge_layers()]
        states = [state for layer in self.state_layers() if (state := layer.get_state(adapter_name)) is not None]
        prefix = KVPrefix(
            tuple(key for key, _ in pairs),
            tuple(value for _, value in pairs),
            tuple(states),
            self._config_of(adapter_name).num_tokens or 0,
        )
        return prefix.map(lambda tensor: tensor.detach().clone())

    @torch.no_grad()
    def set_kv_prefix(self, prefix: KVPrefix, adapter_name: str = "default") -> None:
        """Puts keys and values into an adapter, frozen tokens included, and states, if it has any.

        Raises:
            ValueError: the prefix has another number of tokens, belongs to a model of another shape, lacks states that the
                adapter has, or is not finite.
        """
        self._check_adapter(adapter_name)
        layers = self.cartridge_layers()
        states = [state for layer in self.state_layers() if (state := layer.get_state(adapter_name)) is not None]
        config = self._config_of(adapter_name)
        expected = config.num_tokens
        if layers and prefix.num_tokens != expected:
            raise ValueError(f"`prefix` has {prefix.num_tokens} tokens, adapter {adapter_name!r} has {expected}.")
        have = [(k.shape[0], k.shape[2], v.shape[2]) for k, v in zip(prefix.keys, prefix.values, strict=True)]
        if have != (want := [layer.shape for layer in layers]):
            raise ValueError(f"`prefix` was made by another model: its layers are {have}, this model's {want}.")
        if states and not prefix.states:
            raise ValueError(
                f"`prefix` holds no states, which adapter {adapter_name!r} has in {len(states)} recurrent layers: make it "
                'with this model, or the adapter with `recurrent_state="skip"`.'
            )
        if states:
            _check_states(prefix.states, states)
        for index, tensors in enumerate((*zip(prefix.keys, prefix.values, strict=True), *_values(prefix.states))):
            if not all(tensor.isfinite().all() for tensor in tensors):
                kind, number = ("layer", index) if index < len(have) else ("state", index - len(have))
                raise ValueError(f"`prefix` holds NaN or infinite values in {kind} {number}.")
        for layer, key, value in zip(layers, prefix.keys, prefix.values, strict=True):
            for name, tensor in _split_frozen(key, value, config).items():
                getattr(layer, name)[adapter_name].copy_(tensor)
        for own, given in zip(states, prefix.states if states else (), strict=True):
            for name, tensor in own.items():
                tensor.copy_(given[name])

    def _config_of(self, adapter_name: str) -> CartridgeConfig:
        config = self.peft_config[adapter_name]
        assert isinstance(config, CartridgeConfig)
        return config

    def _check_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(
                f"`adapter_name={adapter_name!r}` is not loaded; there are: {', '.join(self.peft_config) or 'none'}."
            )

    # -- files: stock PEFT's format, see `file_format` ---------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        if isinstance(config, PromptLearningConfig):
            return CartridgeEncoder._get_adapter_state_dict(
                model, config, adapter_name, state_dict, unwanted_adapter_names
            )
        keys, values = [], []
        for name in _layer_names(model, KeyValueLayer):
            parts = {part: state_dict[f"{name}.{part}.{adapter_name}"] for part in _PARTS}
            keys.append(torch.cat([parts["kv_prefix_frozen_key"], parts["kv_prefix_key"]], dim=1))
            values.append(torch.cat([parts["kv_prefix_frozen_value"], parts["kv_prefix_value"]], dim=1))
        states = [
            {part: state_dict[f"{name}.{part}"] for part in shapes}
            for name, shapes in _state_names(model, config, adapter_name)
        ]
        prefix = KVPrefix(tuple(keys), tuple(values), tuple(states), config.num_tokens)
        return prefix_to_tensors(prefix.detach(), config)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if isinstance(config, PromptLearningConfig):
            return state_dict
        prefix = tensors_to_prefix(state_dict, config)
        remapped = {name: tensor for name, tensor in state_dict.items() if not is_cartridge_tensor(name)}
        for name, key, value in zip(_layer_names(model, KeyValueLayer), prefix.keys, prefix.values, strict=True):
            for part, tensor in _split_frozen(key, value, config).items():
                remapped[f"{name}.{part}.{adapter_name}"] = tensor.clone()
        for (name, _), state in zip(_state_names(model, config, adapter_name), prefix.states, strict=True):
            remapped |= {f"{name}.{part}": tensor.float() for part, tensor in state.items()}
        return remapped

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key if is_cartridge_tensor(key) else super()._remove_adapter_name_from_key(key, adapter_name)


def _layer_names(model: nn.Module, kind: type[CartridgeLayer]) -> list[str]:
    """Qualified names of the cartridge layers of a kind as a state dict has them, ordered by layer index."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    layers.sort(key=lambda named: named[1].layer_idx)
    return [name.removeprefix("_fsdp_wrapped_module.") for name, _ in layers]


def _state_names(model: nn.Module, config: CartridgeConfig, adapter_name: str) -> list[tuple[str, dict[str, Any]]]:
    """Where an adapter's states are in a state dict, by layer index, each with its parts' names."""
    shapes = [shapes for shapes in config.layer_states or () if shapes is not None]
    kind = "kv_prefix_state" if config.recurrent_state == "train" else "kv_prefix_frozen_state"
    names = _layer_names(model, StateLayer) if shapes else []
    return [(f"{name}.{kind}.{adapter_name}", parts) for name, parts in zip(names, shapes, strict=True)]


def _check_states(given: Sequence[Mapping[str, Tensor]], own: Sequence[Mapping[str, Tensor]]) -> None:
    have, want = ([{n: tuple(t.shape) for n, t in state.items()} for state in states] for states in (given, own))
    if len(have) != len(want):
        raise ValueError(f"`prefix` was made by another model: it has {len(have)} states, this model {len(want)}.")
    for index, pair in enumerate(zip(have, want, strict=True)):
        if pair[0] != pair[1]:
            raise ValueError(
                f"`prefix` was made by another model: its state {index} is {pair[0]}, this model's {pair[1]}."
            )


def _values(states: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    yield from (tuple(state.values()) for state in states)


def _split_frozen(key: Tensor, value: Tensor, config: CartridgeConfig) -> dict[str, Tensor]:
    frozen = config.num_frozen_tokens
    return dict(zip(_PARTS, (key[:, :frozen], key[:, frozen:], value[:, :frozen], value[:, frozen:]), strict=True))


def _output_embeddings(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _contiguous_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`generate` asks for the logits of a prompt's last position, a slice. PyTorch multiplies a slice with a weight that
    is frozen by a copy of the weight for each row, 57 MB for SmolLM2."""
    return tuple(arg.contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args)
