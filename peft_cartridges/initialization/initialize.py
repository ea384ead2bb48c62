"""`initialize_cartridge`, and the table of strategies by which it gives an adapter its first keys and values."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import nn

from ..attention.probe import UnsupportedModelError
from ..kv_prefix import KVPrefix
from ..tuner.model import CartridgeModel
from .attention_matching import attention_matching
from .most_attended import most_attended
from .pretrained import pretrained
from .random_vectors import random_vectors
from .states import states_after_text
from .summary import summary
from .text_tokens import first_tokens, random_tokens, sampled_chunks


class InitializationStrategy(Protocol):
    """Makes a prefix of exactly `num_tokens` tokens from a text, with a model that has no active cartridge. Further
    keyword arguments are options that `initialize_cartridge` hands on.

    Recurrent layers begin from the prefix's states. Where it has none (`KVPrefix.without_states`), they begin from what the
    whole text leaves (`states_after_text`), or, if the strategy needs no text, as without any."""

    def __call__(
        self, model: nn.Module, processing_class: Any, text: Any, *, num_tokens: int, chat_template: bool
    ) -> KVPrefix: ...


def auto(model: nn.Module, processing_class: Any, text: str, *, num_tokens: int, chat_template: bool) -> KVPrefix:
    """`attention_matching`; `most_attended` where there are no values of single heads to fit; with a warning
    `first_tokens` where keys cannot be moved (learned positions)."""
    options: dict[str, Any] = {"num_tokens": num_tokens, "chat_template": chat_template}
    strategies: list[InitializationStrategy] = [attention_matching, most_attended]
    reason: UnsupportedModelError | None = None
    for strategy in strategies:
        try:
            return strategy(model, processing_class, text, **options)
        except UnsupportedModelError as error:
            reason = error
    warnings.warn(f"Initialization from the first tokens of the text: {reason}", stacklevel=2)
    return first_tokens(model, processing_class, text, **options)


@dataclasses.dataclass(frozen=True)
class _Row:
    make: InitializationStrategy
    needs_text: bool = True
    needs_tokens: bool = True  # and so cannot fill a cartridge of states alone


_STRATEGIES: dict[str, _Row] = {
    "attention_matching": _Row(attention_matching),
    "auto": _Row(auto, needs_tokens=False),
    "first_tokens": _Row(first_tokens),
    "most_attended": _Row(most_attended),
    "pretrained": _Row(cast(Any, pretrained), needs_text=False, needs_tokens=False),
    "random_tokens": _Row(random_tokens, needs_text=False),
    "random_vectors": _Row(random_vectors, needs_text=False),
    "sampled_chunks": _Row(sampled_chunks),
    "summary": _Row(summary),
}
_GIVEN = ("num_tokens", "chat_template")


def register_strategy(name: str, strategy: InitializationStrategy, *, needs_text: bool = True) -> None:
    """Adds a strategy of your own.

    Args:
        name: What `strategy=` and `SelfStudyConfig(initialization=…)` will call it.
        strategy: See `InitializationStrategy`.
        needs_text: Whether it makes something of a text; otherwise it may be given `None`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _STRATEGIES:
        raise ValueError(f"There is an initialization strategy `{name}` already.")
    _STRATEGIES[name] = _Row(strategy, needs_text, needs_tokens=False)


def list_strategies() -> list[str]:
    """The names of all strategies, those that you registered included."""
    return sorted(_STRATEGIES)


def initialize_cartridge(
    model: PeftModel,
    processing_class: Any = None,
    *,
    text: str | None = None,
    prefix: KVPrefix | None = None,
    strategy: str = "auto",
    adapter_name: str | None = None,
    chat_template: bool = True,
    **options: Any,
) -> KVPrefix:
    """Fills a cartridge from a text, or from a prefix that is there already.

    A strategy chooses keys and values for attention layers. Recurrent layers begin from the state that the text leaves (see
    `docs/hybrids.md`); with `num_tokens=0` that is all there is, and the strategy stays `auto`.

    A cartridge that `get_peft_model` has just made holds noise; training from a part of the text itself is faster and
    ends better (arXiv 2506.06266, ablation of initializations). Which part makes more of a difference than anything
    else: see `docs/training.md`.

    Args:
        model: The PEFT model with the cartridge.
        processing_class: Tokenizer or processor of the base model; needed with `text`.
        text: The corpus, or a representative part of it.
        prefix: Instead of `text`: keys and values to take as they are.
        strategy: How `num_tokens` tokens are made of the text. `most_attended`: each head's own, by the attention that
            they receive when the model recites the text. `attention_matching`: such, then fitted. `first_tokens`: the
            first ones, the paper's. `auto`: the first of these that the model allows, the fitted ones before the others.
            `list_strategies()` has those that you registered too.
        adapter_name: Which adapter; the active one by default.
        chat_template: Whether the text stands in a system message, as in `KVPrefix.from_text`.
        options: Further arguments of the strategy.

    Returns:
        The prefix that the cartridge now holds.

    Raises:
        ValueError: neither or both of `text` and `prefix` are given, the text is empty or shorter than the cartridge,
            the strategy is unknown, has no such option or chooses tokens for a cartridge that has none, or the adapter is no
            cartridge of this package.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, CartridgeModel):
        raise ValueError(
            f"`model` is a {type(model).__name__} without a cartridge: make one with "
            "`get_peft_model(model, peft_cartridges.CartridgeConfig(num_tokens=…))`."
        )
    name = tuner.active_adapters[0] if adapter_name is None else adapter_name
    if name not in tuner.peft_config:
        raise ValueError(f"`adapter_name={name!r}` is not loaded; there are: {', '.join(tuner.peft_config)}.")
    if strategy not in _STRATEGIES:
        raise ValueError(f"`strategy={strategy!r}` is unknown; there are: {', '.join(list_strategies())}.")
    row = _STRATEGIES[strategy]
    if row.needs_tokens and prefix is None and not tuner._config_of(name).num_tokens:
        raise ValueError(
            f"`strategy={strategy!r}` chooses tokens of the text, and the cartridge has none (`num_tokens=0`): it begins from "
            'the state that the text leaves with `strategy="auto"`.'
        )
    if (text is not None and prefix is not None) or (text is None and prefix is None and row.needs_text):
        raise ValueError("Give one of `text` (with `processing_class`) and `prefix`.")
    if prefix is None:
        if processing_class is None and text is not None:
            raise ValueError("`processing_class` is missing: pass the tokenizer of the base model with `text`.")
        check_options(strategy, options)
        with model.disable_adapter():
            prefix = _make(
                tuner, name, strategy, model.get_base_model(), processing_class, text, chat_template, options
            )
    elif options:
        raise ValueError(f"`{next(iter(options))}` is an option of a strategy, and `prefix` is taken as it is.")
    tuner.set_kv_prefix(prefix, name)
    return prefix


def _make(
    tuner: CartridgeModel,
    adapter_name: str,
    strategy: str,
    base: nn.Module,
    processing_class: Any,
    text: str | None,
    chat_template: bool,
    options: dict[str, Any],
) -> KVPrefix:
    config, row = tuner._config_of(adapter_name), _STRATEGIES[strategy]
    if not config.num_tokens and strategy == "auto":
        prefix = tuner.get_kv_prefix(adapter_name)  # for the shapes of no tokens
        fill = True
    else:
        prefix = row.make(
            base,
            processing_class,
            text,
            num_tokens=config.num_tokens or 0,
            chat_template=chat_template,
            **options,
        )
        fill = config.layer_states is not None and not prefix.states
    if not fill:
        return prefix
    if row.needs_text:
        states = states_after_text(base, processing_class, text or "", chat_template=chat_template)
    else:
        held = tuner.get_kv_prefix(adapter_name).states
        states = tuple({part: torch.zeros_like(tensor) for part, tensor in state.items()} for state in held)
    return dataclasses.replace(prefix, states=states)


def needs_text(name: str) -> bool:
    """Whether a strategy makes something of a text."""
    return _STRATEGIES[name].needs_text


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Whether a strategy can be called with these options.

    Raises:
        ValueError: it has no such option, or another must be given.
    """
    parameters = inspect.signature(_STRATEGIES[name].make).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _GIVEN}
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"The strategy `{name}` has no option `{unknown[0]}`; it has: {', '.join(known) or 'none'}.")
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"The strategy `{name}` needs the option `{option}`.")
