"""Whether a base model is the one that a cartridge was trained on. Its keys and values mean nothing to any other."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..adapter_folder import read_config
from ..attention.probe import find_attention_layers, find_recurrent_layers, get_text_config
from ..model_identity import model_fingerprint
from ..tuner.config import CartridgeConfig
from .card_facts import BaseIdentity, CardFacts, load_facts
from .model_card import is_hub_name

# What decides how keys and values come about. Another value of any of these is another model.
_SHAPE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
)


def identify_base_model(model: nn.Module, *, hash_weights: bool = True) -> BaseIdentity:
    """What tells this base model from others, to keep with a cartridge.

    Args:
        model: A transformers causal LM, or a PEFT model around one.
        hash_weights: Whether to hash the weights (`model_fingerprint`: one checkpoint has one hash in every dtype).
            There is no hash while they are quantized or offloaded.

    The name is kept only if it is one on the Hub: a path says nothing elsewhere, and something about this machine.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config = get_text_config(model)
    name = getattr(model, "name_or_path", None) or getattr(model.config, "_name_or_path", None)
    found = {key: getattr(config, key, None) for key in (*_SHAPE, "vocab_size")}
    found["rope_parameters"] = _plain(found["rope_parameters"] or _older_rope_parameters(config))
    return BaseIdentity(
        name=name if name and is_hub_name(name) else None,
        revision=getattr(model.config, "_commit_hash", None),
        weights_sha256=_hash_weights(model) if hash_weights else None,
        **found,
    )


def check_base_model(model: nn.Module, cartridge: str | Path, *, hash_weights: bool = True) -> None:
    """Compares a base model with the one that the cartridge in a folder was trained on, before it is loaded.

    What the folder does not say is not compared: stock PEFT records the name and the number of layers and heads, this
    package's `cartridge.json` also RoPE settings and a hash of the weights.

    Raises:
        ValueError: another architecture, shape or RoPE settings.

    Warns:
        UserWarning: the same shape, but other weights, or (where no hash can tell) another name or revision.
    """
    config, facts = read_config(cartridge), load_facts(cartridge)
    have = identify_base_model(model, hash_weights=hash_weights)
    _check_heads(model, config, facts)
    if facts.base_identity is not None:
        compare_identities(have, facts.base_identity, "the model", str(cartridge))
    want = facts.base_identity or BaseIdentity()
    if have.weights_sha256 and want.weights_sha256:
        if have.weights_sha256 != want.weights_sha256:
            warnings.warn(
                f"The weights of the model are not those that {cartridge} was trained on"
                f"{_named(facts, config)}: expect worse answers.",
                stacklevel=2,
            )
        return
    name = want.name or facts.base_model or config.base_model_name_or_path
    loaded = getattr(model, "name_or_path", None)
    if name and loaded and loaded not in (name, config.base_model_name_or_path):
        warnings.warn(
            f"{cartridge} was trained on {name!r}, the model is {loaded!r}: if they are not the same, expect nonsense.",
            stacklevel=2,
        )
    elif want.revision and have.revision and want.revision != have.revision:
        warnings.warn(
            f"{cartridge} was trained on revision {want.revision} of {name}, the model is {have.revision}: pass "
            f"`revision={want.revision!r}` when you load it.",
            stacklevel=2,
        )


def compare_identities(have: BaseIdentity, want: BaseIdentity, have_name: str, want_name: str) -> None:
    """Raises:
    ValueError: both know a field of the shape, and it differs; the message names all such fields.
    """
    pairs = {field: (getattr(have, field), _plain(getattr(want, field))) for field in _SHAPE}
    differing = [
        f"`{field}` is {mine!r} in {have_name} and {theirs!r} for {want_name}"
        for field, (mine, theirs) in pairs.items()
        if mine is not None and theirs is not None and mine != theirs
    ]
    if differing:
        base = f" Load {want.name!r}." if want.name else ""
        raise ValueError(f"{want_name} was trained on another base model: {'; '.join(differing)}.{base}")


def _check_heads(model: nn.Module, config: CartridgeConfig, facts: CardFacts) -> None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    skips = config.recurrent_state == "skip"
    have = [layer.shape for layer in find_attention_layers(base, skip_unsupported=skips)]
    if config.layer_shapes is not None:
        want = [tuple(shape) for shape in config.layer_shapes if shape is not None]
    else:
        assert config.num_layers and config.num_attention_heads and config.token_dim
        head_dim = config.token_dim // config.num_attention_heads
        want = [(config.num_attention_heads, head_dim, head_dim)] * config.num_layers
    if have != want:
        raise ValueError(
            f"The cartridge has {len(want)} layers of (num_key_value_heads, key_dim, value_dim) {_first(want)}, the model "
            f"{len(have)} of {_first(have)}: it was trained on another base model{_named(facts, config)}."
        )
    states = (
        []
        if skips
        else [
            {name: list(state.shape) for name, state in layer.states.items()} for layer in find_recurrent_layers(base)
        ]
    )
    held = [state for state in config.layer_states or () if state is not None]
    if states != held:
        raise ValueError(
            f"The cartridge has states of {len(held)} recurrent layers, the first of {_first(held)}, the model has "
            f"{len(states)} such layers, the first of {_first(states)}: it was trained on another base "
            f"model{_named(facts, config)}."
        )


def _first(shapes: Sequence[Any]) -> Any:
    return shapes[0] if shapes else "none"


def _named(facts: CardFacts, config: CartridgeConfig) -> str:
    name = facts.base_model or config.base_model_name_or_path
    return f" ({name})" if name else ""


def _older_rope_parameters(config: Any) -> dict[str, Any] | None:
    found = {key: getattr(config, key, None) for key in ("rope_theta", "rope_scaling")}
    return {key: value for key, value in found.items() if value is not None} or None


def _plain(value: Any) -> Any:
    """As JSON gives it back, with every number a float, so that 10000 and 10000.0 are one."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if value is None or isinstance(value, (str, bool, float)) else json.loads(json.dumps(value))


def _hash_weights(model: nn.Module) -> str | None:
    """`model_fingerprint`, where all weights are here as they were trained."""
    changed = getattr(model, "hf_quantizer", None) is not None
    if changed or any(weight.device.type == "meta" or not weight.is_floating_point() for weight in model.parameters()):
        return None
    return model_fingerprint(model)
