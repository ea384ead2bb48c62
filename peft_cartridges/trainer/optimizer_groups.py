"""Learning rates for keys and values apart."""

from __future__ import annotations

from typing import Any

from torch import nn

_PARTS = {"kv_prefix_key": "key_learning_rate", "kv_prefix_value": "value_learning_rate"}


def parameter_groups(
    model: nn.Module,
    *,
    key_learning_rate: float | None = None,
    value_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """An optimizer's groups: the keys, the values, and other trainable parameters if there are any. A rate of `None` is
    the optimizer's own. Schedules scale each group's rate alike."""
    rates = {"key_learning_rate": key_learning_rate, "value_learning_rate": value_learning_rate}
    groups: dict[str, list[nn.Parameter]] = {"kv_prefix_key": [], "kv_prefix_value": [], "": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part in _PARTS if f".{part}." in f".{name}."), "")
            groups[part].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay,
            **({} if not part or rates[_PARTS[part]] is None else {"lr": rates[_PARTS[part]]}),
        }
        for part, parameters in groups.items()
        if parameters
    ]
