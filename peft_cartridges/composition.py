"""Composition: several cartridges of one base model joined into one, in the caller's order.

The rules, which `docs/composition.md` explains:

- Keys and values are concatenated along the tokens. Keys keep the positions that they were trained at.
- States of recurrent layers do not concatenate: those of recurrences are added up, of convolutions the mean is taken
  (`tuner/states.py`).
- One attention sink is kept: where the first part has frozen tokens, those of the later parts are left out
  (`sinks="first"`). `sinks="all"` keeps every token, as stock PEFT and `set_adapter([…])` do.
- As many first tokens are frozen in the result as in the first part.
- The dtype is the one that holds all parts' values: `torch.promote_types`, so bfloat16 with float16 gives float32.
- The parts' shapes, base models and readings of sliding windows must agree.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Literal, cast

import torch
from peft import PeftModel

from .kv_prefix import KVPrefix
from .tuner import CartridgeConfig, CartridgeModel
from .tuner.states import join_states

SinkRule = Literal["first", "all"]


@dataclasses.dataclass(frozen=True)
class NamedCartridge:
    """A part of a composition: what to call it in errors, its configuration, its keys and values."""

    name: str
    config: CartridgeConfig
    prefix: KVPrefix


def join_cartridges(
    parts: Sequence[NamedCartridge], *, sinks: SinkRule = "first", base_model: str | None = None
) -> tuple[CartridgeConfig, KVPrefix]:
    """One cartridge of several, by the rules above.

    Args:
        parts: At least two, in order.
        sinks: `first` leaves out the frozen tokens of all parts but the first, `all` keeps them.
        base_model: The name of the base model of all of them. Give it where the parts call one model by different
            names (a folder, and its name on the Hub).

    Raises:
        ValueError: fewer than two parts, an unknown rule, or parts that do not go together; the message says which.
    """
    if len(parts) < 2:
        raise ValueError(f"Composition needs at least two cartridges, got {len(parts)}.")
    if sinks not in ("first", "all"):
        raise ValueError(f"`sinks` must be 'first' or 'all', got {sinks!r}.")
    first = parts[0]
    for part in parts[1:]:
        _check_pair(first, part, base_model)
    dtype = functools.reduce(torch.promote_types, (part.prefix.dtype for part in parts))
    device = next(first.prefix.tensors()).device
    states = [[{n: t.to(device) for n, t in state.items()} for state in part.prefix.states] for part in parts]
    joined = tuple(join_states(layer) for layer in zip(*states, strict=True))
    if first.prefix.keys:
        kept = [first.prefix, *(_without_sink(first, part, sinks) for part in parts[1:])]
        pieces = [dataclasses.replace(piece, states=()).to(device=device, dtype=dtype) for piece in kept]
        prefix = dataclasses.replace(KVPrefix.concatenate(pieces), states=joined)
    else:
        prefix = KVPrefix(states=joined, num_tokens=0)
    readings = {part.config.attention for part in parts}
    config = CartridgeConfig(
        num_tokens=prefix.num_tokens,
        num_frozen_tokens=first.config.num_frozen_tokens,
        attention=readings.pop() if len(readings) == 1 else "auto",
        sliding_window=first.config.sliding_window,
        recurrent_state=first.config.recurrent_state,
        layer_shapes=first.config.layer_shapes,
        layer_states=first.config.layer_states,
        token_dim=first.config.token_dim,
        num_layers=first.config.num_layers,
        num_attention_heads=first.config.num_attention_heads,
        task_type=first.config.task_type,
        base_model_name_or_path=base_model or _base_name(parts),
        revision=next((part.config.revision for part in parts if part.config.revision), None),
        inference_mode=True,
    )
    return config, prefix


def compose_adapters(
    model: PeftModel, adapter_names: Sequence[str], adapter_name: str, *, sinks: SinkRule = "first"
) -> PeftModel:
    """Adds to a loaded model one adapter made of several that it has. `set_adapter(adapter_name)` activates it.

    `model.set_adapter([…])` composes without a copy; this makes an adapter that can be saved, trained and used with
    `adapter_names=[…]`.

    Raises:
        ValueError: the model has no cartridges, a name is not loaded, `adapter_name` is taken, or the parts do not go
            together.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, CartridgeModel):
        raise ValueError(f"`model` is a {type(model).__name__} without cartridges of this package.")
    if unknown := [name for name in adapter_names if name not in tuner.peft_config]:
        raise ValueError(f"Not loaded: {', '.join(unknown)}. There are: {', '.join(tuner.peft_config)}.")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"`adapter_name={adapter_name!r}` is taken: choose another, or `delete_adapter` it first.")
    configs = [cast(CartridgeConfig, tuner.peft_config[name]) for name in adapter_names]
    parts = [
        NamedCartridge(name, config, tuner.get_kv_prefix(name))
        for name, config in zip(adapter_names, configs, strict=True)
    ]
    config, prefix = join_cartridges(parts, sinks=sinks, base_model=_base_name(parts))
    model.add_adapter(adapter_name, config)
    tuner.set_kv_prefix(prefix, adapter_name)
    return model


def _check_pair(first: NamedCartridge, part: NamedCartridge, base_model: str | None) -> None:
    if part.config.modules_to_save or first.config.modules_to_save:
        raise ValueError(
            f"{first.name} or {part.name} carries whole modules besides the cartridge (`modules_to_save`), which "
            "cannot be joined."
        )
    shapes = [
        [(*key.shape[::2], value.shape[2]) for key, value in zip(p.prefix.keys, p.prefix.values, strict=True)]
        for p in (first, part)
    ]
    if (first.config.layer_states is None) != (part.config.layer_states is None):
        raise ValueError(
            f"Of {first.name} and {part.name} one holds states of recurrent layers and the other does not "
            "(`recurrent_state`), so they cannot be joined: train both alike."
        )
    forms = [(p.config.layer_shapes, p.config.layer_states) for p in (first, part)]
    if shapes[0] != shapes[1] or forms[0] != forms[1]:
        differing = next((pair for pair in zip(*shapes, strict=False) if pair[0] != pair[1]), None)
        detail = (
            "states of other shapes or layers"
            if shapes[0] == shapes[1]
            else f"{len(shapes[0])} and {len(shapes[1])} layers"
            if differing is None
            else f"layers of (num_key_value_heads, key_dim, value_dim) {differing[0]} and {differing[1]}"
        )
        raise ValueError(
            f"{part.name} belongs to another base model than {first.name}: they have {detail}. Only cartridges of one "
            "base model can be composed."
        )
    names = [p.config.base_model_name_or_path for p in (first, part)]
    if base_model is None and all(names) and names[0] != names[1]:
        raise ValueError(
            f"{part.name} was trained on {names[1]!r} and {first.name} on {names[0]!r}. Only cartridges of one base "
            "model can be composed; if these are one model under two names, say so with `base_model=…`."
        )
    if first.config.sliding_window != part.config.sliding_window:
        raise ValueError(
            f"{first.name} has sliding_window={first.config.sliding_window!r} and {part.name} "
            f"{part.config.sliding_window!r}: set one of them to the other in its adapter_config.json."
        )
    revisions = [p.config.revision for p in (first, part)]
    if all(revisions) and revisions[0] != revisions[1]:
        warnings.warn(
            f"{first.name} and {part.name} were trained on different revisions of the base model "
            f"({revisions[0]}, {revisions[1]}).",
            stacklevel=4,
        )


def _without_sink(first: NamedCartridge, part: NamedCartridge, sinks: SinkRule) -> KVPrefix:
    frozen = part.config.num_frozen_tokens
    prefix = dataclasses.replace(part.prefix, states=())
    if sinks == "all" or first.config.num_frozen_tokens == 0 or frozen == 0:
        return prefix
    if frozen == prefix.num_tokens:
        raise ValueError(f"{part.name} has frozen tokens only, and would be left out whole: pass `sinks='all'`.")
    if not _repeats(first.prefix, prefix[:frozen]):
        warnings.warn(
            f"The {frozen} frozen tokens of {part.name} are not those of {first.name}, and are left out nevertheless. "
            "If they hold something of their own, pass `sinks='all'`.",
            stacklevel=4,
        )
    return prefix[frozen:]


def _repeats(first: KVPrefix, sink: KVPrefix) -> bool:
    """Whether the tokens of `sink` are the first ones of `first`, up to the rounding of the coarser dtype."""
    if sink.num_tokens > first.num_tokens:
        return False
    tolerance = 1e-4 if {first.dtype, sink.dtype} <= {torch.float32, torch.float64} else 2e-2
    pairs = zip((*first.keys, *first.values), (*sink.keys, *sink.values), strict=True)
    return all(
        torch.allclose(a[:, : sink.num_tokens].float(), b.to(a.device).float(), rtol=tolerance, atol=tolerance)
        for a, b in pairs
    )


def _base_name(parts: Sequence[NamedCartridge]) -> str | None:
    return next((part.config.base_model_name_or_path for part in parts if part.config.base_model_name_or_path), None)
