"""The cartridges of one layer of a model, as PEFT finds, trains and saves them: keys and values in an attention layer, an
initial state in a recurrent one."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..attention.probe import AttentionLayer, RecurrentLayer, execution_device
from .config import CartridgeConfig


class CartridgeLayer(nn.Module, BaseTunerLayer):
    """Stands around a module of the model and holds what each adapter puts in front of it.

    It computes nothing: while the module runs, the tuner is asked for what is due (see `attention/delivery.py`).
    """

    def __init__(self, base_layer: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_idx = layer_idx
        self.adapter_configs: dict[str, CartridgeConfig] = {}
        self._active_adapter = []

    def __getattr__(self, name: str) -> Any:
        """A model that reads an attribute of its module finds it on the wrapped one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def update_layer(self, adapter_name: str, config: CartridgeConfig) -> None:
        """Adds an adapter that knows nothing; see `initialize_cartridge` for better ones."""
        raise NotImplementedError  # house-ok: each kind of layer has its own

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
        self.adapter_configs.clear()  # nothing is due to this layer any more
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "A cartridge is a KV cache, not a change of weights: it cannot be merged into the model. Use `unload()` to "
            "take it off."
        )

    unmerge = merge

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT looks for `weight` on the wrapped module; these have projections instead.
        parameter = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
        return execution_device(base_layer), torch.float32 if parameter is None else parameter.dtype


class KeyValueLayer(CartridgeLayer):
    """Around an attention module: for each adapter keys `[num_key_value_heads, num_tokens, key_dim]` and values
    `[num_key_value_heads, num_tokens, value_dim]`, the frozen first tokens apart from the trainable rest."""

    adapter_layer_names = ("kv_prefix_key", "kv_prefix_value")
    other_param_names = ("kv_prefix_frozen_key", "kv_prefix_frozen_value", "adapter_configs")

    def __init__(self, base_layer: nn.Module, layer: AttentionLayer) -> None:
        super().__init__(base_layer, layer.layer_idx)
        self.shape = layer.shape
        self.kv_prefix_key = nn.ParameterDict()
        self.kv_prefix_value = nn.ParameterDict()
        # Buffers, so that nothing that goes over parameters can make them learn.
        self.kv_prefix_frozen_key = BufferDict(persistent=True)
        self.kv_prefix_frozen_value = BufferDict(persistent=True)

    def update_layer(self, adapter_name: str, config: CartridgeConfig) -> None:
        """Adds an adapter with random keys and values."""
        heads, *dims = self.shape
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        assert config.num_tokens is not None
        trainable = config.num_tokens - config.num_frozen_tokens
        for part, dim in zip(("key", "value"), dims, strict=True):
            frozen = torch.randn(heads, config.num_frozen_tokens, dim, device=device, dtype=dtype) * 0.02
            getattr(self, f"kv_prefix_frozen_{part}")[adapter_name] = frozen
            learns = torch.randn(heads, trainable, dim, device=device, dtype=dtype) * 0.02
            getattr(self, f"kv_prefix_{part}")[adapter_name] = nn.Parameter(learns)
        self.adapter_configs[adapter_name] = config

    def parameters_of(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """An adapter's frozen keys, trainable keys, frozen values and trainable values."""
        return (
            self.kv_prefix_frozen_key[adapter_name],
            self.kv_prefix_key[adapter_name],
            self.kv_prefix_frozen_value[adapter_name],
            self.kv_prefix_value[adapter_name],
        )

    def get_tokens(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Keys and values of an adapter, frozen tokens first."""
        frozen_key, key, frozen_value, value = self.parameters_of(adapter_name)
        return join_tokens(frozen_key, key), join_tokens(frozen_value, value)


class StateLayer(CartridgeLayer):
    """Around a recurrent module: for each adapter the state that the module begins from, a tensor for each of its parts
    (`RecurrentLayer.states`), at least float32 whatever the model's dtype. Parameters of adapters with
    `recurrent_state="train"`, buffers of those with `"initialize"`."""

    adapter_layer_names = ("kv_prefix_state",)
    other_param_names = ("kv_prefix_frozen_state", "adapter_configs")

    def __init__(self, base_layer: nn.Module, layer: RecurrentLayer) -> None:
        super().__init__(base_layer, layer.layer_idx)
        self.states = dict(layer.states)
        self.kv_prefix_state = nn.ModuleDict()
        self.kv_prefix_frozen_state = nn.ModuleDict()

    def update_layer(self, adapter_name: str, config: CartridgeConfig) -> None:
        """Adds an adapter with the state of no text."""
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        dtype = torch.promote_types(dtype, torch.float32)
        begin = {name: torch.zeros(state.shape, device=device, dtype=dtype) for name, state in self.states.items()}
        if config.recurrent_state == "train":
            parameters = {name: nn.Parameter(state) for name, state in begin.items()}
            self.kv_prefix_state[adapter_name] = nn.ParameterDict(parameters)
        else:
            self.kv_prefix_frozen_state[adapter_name] = BufferDict(begin, persistent=True)
        self.adapter_configs[adapter_name] = config

    def get_state(self, adapter_name: str) -> dict[str, Tensor] | None:
        """The state of an adapter by its parts' names, or `None` where it has none."""
        for held in (self.kv_prefix_state, self.kv_prefix_frozen_state):
            if adapter_name in held:
                parts: Any = held[adapter_name]  # a dictionary of parameters, or of buffers
                return dict(parts.items())
        return None


def join_tokens(*tensors: Tensor) -> Tensor:
    """Concatenation along the tokens, without a copy where only one tensor holds any."""
    filled = [tensor for tensor in tensors if tensor.shape[1]]
    return filled[0] if len(filled) == 1 else torch.cat(filled or tensors[:1], dim=1)
