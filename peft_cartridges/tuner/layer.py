"""`CartridgeLayer`: an attention module that attends to cartridges in front of its own keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attention.interface import PREFIX_ARGUMENT, LayerPrefix, with_shared_prefix
from ..attention.layers import AttentionLayer, execution_device
from .config import CartridgeConfig

BASE_ROW = "__base__"


class CartridgeLayer(nn.Module, BaseTunerLayer):
    """Wraps an attention module. Per adapter it holds keys `[num_key_value_heads, num_tokens, key_dim]` and values
    `[num_key_value_heads, num_tokens, value_dim]`, the frozen first tokens apart from the trainable rest.

    While a cartridge is active, the wrapped module has a configuration of its own that makes it call our attention
    function; otherwise it has the model's, and is exactly what it was.
    """

    adapter_layer_names = ("kv_prefix_key", "kv_prefix_value")
    other_param_names = ("kv_prefix_frozen_key", "kv_prefix_frozen_value", "adapter_configs")

    def __init__(self, base_layer: nn.Module, shape: AttentionLayer, source: CartridgeLayer | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        # The layer that holds what this one attends to, where that is another; no submodule of this one.
        self.__dict__["source"] = source
        self.shape = (shape.num_key_value_heads, shape.key_dim, shape.value_dim)
        self.model_config = base_layer.config
        self.kv_prefix_key = nn.ParameterDict()
        self.kv_prefix_value = nn.ParameterDict()
        # Buffers, so that nothing that goes over parameters can make them learn.
        self.kv_prefix_frozen_key = BufferDict(persistent=True)
        self.kv_prefix_frozen_value = BufferDict(persistent=True)
        self.adapter_configs: dict[str, CartridgeConfig] = {}
        self.row_adapters: Sequence[str] | None = None
        # In the first layer: the hook that shifts the model's positions by `prefix_lengths`.
        self.hooks: list[RemovableHandle] = []
        self._inference_prefixes: dict[Any, LayerPrefix] = {}
        self._active_adapter = []

    def __getattr__(self, name: str) -> Any:
        """A model that reads an attribute of its attention module finds it on the wrapped one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    # -- adapters ----------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: CartridgeConfig) -> None:
        """Adds an adapter with random keys and values; see `initialize_cartridge` for better ones."""
        self.adapter_configs[adapter_name] = config
        if self.source is not None:
            return
        heads, *dims = self.shape
        parameter = next((p for p in self.base_layer.parameters() if p.is_floating_point()), None)
        dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
        options: Any = {"device": execution_device(self.base_layer), "dtype": dtype}
        assert config.num_tokens is not None
        trainable = config.num_tokens - config.num_frozen_tokens
        for part, dim in zip(("key", "value"), dims, strict=True):
            frozen = torch.randn(heads, config.num_frozen_tokens, dim, **options) * 0.02
            getattr(self, f"kv_prefix_frozen_{part}")[adapter_name] = frozen
            getattr(self, f"kv_prefix_{part}")[adapter_name] = nn.Parameter(
                torch.randn(heads, trainable, dim, **options) * 0.02
            )

    def get_tokens(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Keys and values of an adapter, frozen tokens first."""
        if self.source is not None:
            return self.source.get_tokens(adapter_name)
        key = _join(self.kv_prefix_frozen_key[adapter_name], self.kv_prefix_key[adapter_name])
        return key, _join(self.kv_prefix_frozen_value[adapter_name], self.kv_prefix_value[adapter_name])

    def num_tokens(self, adapter_name: str) -> int:
        return self.kv_prefix_frozen_key[adapter_name].shape[1] + self.kv_prefix_key[adapter_name].shape[1]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._sync()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._sync()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._sync()

    def set_row_adapters(self, names: Sequence[str] | None) -> None:
        """Gives each row of the coming batches its own adapter (`"__base__"` for none), or (`None`) all the active."""
        self.row_adapters = names
        self._sync()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The wrapped module without any adapter. PEFT calls this when another tuner (a LoRA) in the same model is
        taken off, which it does for all adapters at once, but without looking into a layer like this."""
        if merge:
            self.merge()
        for name, module in list(self.base_layer.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(self.base_layer.get_submodule(parent), child, module.get_base_layer())
        return self.restore()

    def restore(self) -> nn.Module:
        """The wrapped module as it was before this layer."""
        self.base_layer.config = self.model_config
        while self.hooks:
            self.hooks.pop().remove()
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "A cartridge is a KV cache, not a change of weights: it cannot be merged into the model. Use `unload()` to "
            "take it off."
        )

    unmerge = merge

    def train(self, mode: bool = True) -> CartridgeLayer:
        self._inference_prefixes.clear()
        return super().train(mode)

    def _sync(self) -> None:
        """The wrapped module calls our attention function exactly while it has something to attend to."""
        self._inference_prefixes.clear()
        if self._adapters_in_use():
            self.base_layer.config = with_shared_prefix(self.model_config)
        else:
            self.base_layer.config = self.model_config

    def _adapters_in_use(self) -> list[str]:
        if self.disable_adapters:
            return []
        names = self.active_adapters if self.row_adapters is None else dict.fromkeys(self.row_adapters)
        return [name for name in names if name in self.adapter_configs]

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        in_use = self._adapters_in_use()
        if in_use:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            kwargs[PREFIX_ARGUMENT] = (*kwargs.get(PREFIX_ARGUMENT, ()), *self._prefixes(in_use, hidden_states))
        return self.base_layer(*args, **kwargs)

    def prefix_lengths(self, batch_size: int) -> int | Tensor:
        """How many tokens stand in front of each row: one number, or (with an adapter per row) `[batch_size]`."""
        in_use = self._adapters_in_use()
        if self.row_adapters is None:
            return sum(self.num_tokens(name) for name in in_use)
        lengths = {name: self.num_tokens(name) for name in in_use}
        return torch.tensor([lengths.get(name, 0) for name in self._adapters_of_rows(batch_size)])

    def _prefixes(self, in_use: list[str], hidden_states: Tensor) -> list[LayerPrefix]:
        if self.row_adapters is None:
            return [self._prefix(tuple(in_use), None, hidden_states.dtype)]
        of_rows = self._adapters_of_rows(hidden_states.shape[0])
        rows = {name: [row for row, of_row in enumerate(of_rows) if of_row == name] for name in in_use}
        return [
            self._prefix((name,), torch.tensor(rows[name], device=hidden_states.device), hidden_states.dtype)
            for name in in_use
            if rows[name]
        ]

    def _adapters_of_rows(self, batch_size: int) -> list[str]:
        """Beams and returned sequences repeat every row some times, next to each other."""
        assert self.row_adapters is not None
        repeats, rest = divmod(batch_size, len(self.row_adapters))
        if rest:
            raise ValueError(
                f"`adapter_names` has {len(self.row_adapters)} names, which does not fit a batch of {batch_size} rows."
            )
        return [name for name in self.row_adapters for _ in range(repeats)]

    def _prefix(self, names: tuple[str, ...], rows: Tensor | None, dtype: torch.dtype) -> LayerPrefix:
        if self.source is not None:
            return self.source._prefix(names, rows, dtype)
        tensors = [
            parameters[name]
            for name in names
            for parameters in (
                self.kv_prefix_frozen_key,
                self.kv_prefix_key,
                self.kv_prefix_frozen_value,
                self.kv_prefix_value,
            )
        ]
        trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        changing = trains or self.training or torch.compiler.is_compiling()
        if changing or any(tensor.is_inference() for tensor in tensors):
            return self._join_adapters(names, rows)
        # Joining frozen and trainable tokens, and rounding them to the model's dtype, at every decoding step would cost
        # more than the attention to them.
        key: Any = (names, dtype, torch.is_inference_mode_enabled())
        key = (*key, *((id(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors))
        if rows is not None:
            key = (*key, tuple(rows.tolist()))
        if key not in self._inference_prefixes:
            if len(self._inference_prefixes) >= 8:
                self._inference_prefixes.clear()
            joined = self._join_adapters(names, rows)
            rounded = dataclasses.replace(joined, key=joined.key.to(dtype), value=joined.value.to(dtype))
            self._inference_prefixes[key] = rounded
        return self._inference_prefixes[key]

    def _join_adapters(self, names: tuple[str, ...], rows: Tensor | None) -> LayerPrefix:
        keys, values = zip(*(self.get_tokens(name) for name in names), strict=True)
        config = self.adapter_configs[names[0]]
        return LayerPrefix(_join(*keys), _join(*values), rows, config.attention, config.sliding_window)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        # PEFT looks for `weight` on the wrapped module; an attention module has projections instead.
        parameter = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
        return execution_device(base_layer), None if parameter is None else parameter.dtype


def _join(*tensors: Tensor) -> Tensor:
    """Concatenation along the tokens, without a copy where only one tensor holds any."""
    filled = [tensor for tensor in tensors if tensor.shape[1]]
    return filled[0] if len(filled) == 1 else torch.cat(filled, dim=1)
