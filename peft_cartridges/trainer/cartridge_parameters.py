"""The keys and values that are trained: learning rates apart, a moving average, and whether they are finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_FILE = "unaveraged.safetensors"


def parameter_groups(
    model: nn.Module, rates: dict[str, float | None], *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """An optimizer's groups: the keys, the values, and other trainable parameters if there are any. Schedules scale each
    group's rate alike.

    Args:
        model: The PEFT model.
        rates: Learning rates of `kv_prefix_key` and `kv_prefix_value`; `None` is the optimizer's own.
        weight_decay: Of all groups.
    """
    groups: dict[str, list[nn.Parameter]] = {part: [] for part in (*rates, "")}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[next((part for part in rates if f".{part}." in f".{name}."), "")].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay,
            **({} if rates.get(part) is None else {"lr": rates[part]}),
        }
        for part, parameters in groups.items()
        if parameters
    ]


def find_broken_parameter(model: nn.Module) -> str | None:
    """Name of a trained parameter that holds NaN or infinite values."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            return name
    return None


def sample_values(model: nn.Module) -> list[list[float]]:
    """A few numbers of each trained parameter, by which to tell whether someone has put something into it."""
    return [p.detach().flatten()[:8].tolist() for p in model.parameters() if p.requires_grad]


class MovingAverage(TrainerCallback):
    """The average `a ← decay · a + (1 - decay) · p` of the trainable parameters, after every step: what is evaluated and
    saved instead of them.

    The decay is capped at `(1 + step) / (10 + step)`, so that the beginning is soon forgotten.

    Args:
        model: Whose trainable parameters are averaged.
        decay: Between 0 and 1; about `1 - 1 / steps` to average over the last `steps`. 0 keeps no average: all methods
            then do nothing.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad} if decay else {}
        self._average: dict[str, Tensor] = {}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begins again at the parameters as they are."""
        self._average = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter.to(self._average[name].device), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Meanwhile the model holds the average."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.apply()
        try:
            yield
        finally:
            self._put(kept)

    def apply(self) -> None:
        """Puts the average into the model for good."""
        self._put(self._average)

    def save(self, folder: str) -> None:
        """Keeps the parameters beside a checkpoint, whose adapter file holds the average."""
        if self._parameters:
            save_file({name: p.detach().contiguous() for name, p in self._parameters.items()}, Path(folder) / _FILE)

    def load(self, folder: str) -> None:
        """Takes up a checkpoint whose adapter file has been loaded already."""
        self.restart()
        path = Path(folder) / _FILE
        if self._parameters and path.is_file():
            self._put(load_file(path))

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
