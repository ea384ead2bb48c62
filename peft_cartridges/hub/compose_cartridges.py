"""`compose()`: cartridges from the Hub, from folders, or of a loaded model, joined into one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from peft import PeftModel

from ..adapter_folder import read_cartridge, write_cartridge
from ..composition import NamedCartridge, SinkRule, compose_adapters, join_cartridges
from ..kv_prefix import KVPrefix
from .base_model import compare_identities
from .card_facts import CardFacts, Part, current_package_versions, load_facts
from .model_card import is_hub_name, write_model_card
from .pull import find_cartridge
from .push import state_bytes

_RULES = {
    "first": "The keys and values are concatenated in this order. Of the frozen first tokens (the attention sink), "
    "those of the first cartridge are kept and those of the others left out.",
    "all": "The keys and values are concatenated in this order, with every token of each.",
}


@overload
def compose(
    cartridges: Sequence[str | Path],
    /,
    *,
    output_dir: str | Path,
    sinks: SinkRule = ...,
    base_model: str | None = ...,
    **hub_options: Any,
) -> Path: ...


@overload
def compose(
    model: PeftModel, adapter_names: Sequence[str], /, adapter_name: str, *, sinks: SinkRule = ...
) -> PeftModel: ...


def compose(
    cartridges_or_model: Any,
    adapter_names: Sequence[str] | None = None,
    /,
    adapter_name: str | None = None,
    *,
    output_dir: str | Path | None = None,
    sinks: SinkRule = "first",
    base_model: str | None = None,
    **hub_options: Any,
) -> Path | PeftModel:
    """Joins cartridges of one base model into one that knows all their texts.

    ```python
    compose(["user/pepsi", "user/amd", "./local"], output_dir="both")  # files, in stock PEFT's format, with a card
    compose(model, ["a", "b"], adapter_name="a+b")  # one more adapter of a loaded model
    ```

    `model.set_adapter(["a", "b"])` composes for a while, without a copy.

    Args:
        cartridges: At least two folders or names on the Hub, in order; `user/name@revision` names a revision.
        output_dir: Where the joined cartridge goes.
        model: A loaded model with cartridges.
        adapter_names: Those of its adapters to join, in order.
        adapter_name: What the new adapter is called; `set_adapter` activates it.
        sinks: `first` keeps one attention sink, that of the first part; `all` keeps every token of every part.
        base_model: The base model's name, where the parts call it by different ones.
        hub_options: Of `pull_cartridge`: `token`, `cache_dir`, `local_files_only`, ….

    Returns:
        `output_dir`, or the model.

    Raises:
        ValueError: the parts belong to different base models, or do not go together otherwise.
        HubError, FileNotFoundError: a part is not to be had.
    """
    if isinstance(cartridges_or_model, PeftModel):
        if adapter_names is None or adapter_name is None or output_dir is not None:
            raise ValueError("With a model: compose(model, ['a', 'b'], adapter_name='a+b').")
        return compose_adapters(cartridges_or_model, adapter_names, adapter_name, sinks=sinks)
    if output_dir is None or adapter_name is not None or isinstance(cartridges_or_model, (str, Path)):
        raise ValueError("With files: compose(['user/a', './b'], output_dir='both').")
    return _compose_files(list(map(str, cartridges_or_model)), Path(output_dir), sinks, base_model, hub_options)


def _compose_files(
    names: list[str], output_dir: Path, sinks: SinkRule, base_model: str | None, hub_options: dict[str, Any]
) -> Path:
    folders = [_find(name, hub_options) for name in names]
    parts = [NamedCartridge(name, *read_cartridge(folder)) for name, folder in zip(names, folders, strict=True)]
    facts = [load_facts(folder) for folder in folders]
    _check_identities(names, facts)
    same = _one_checkpoint(facts)
    base_name = base_model or next((f.base_model for f in facts if f.base_model and is_hub_name(f.base_model)), None)
    config, prefix = join_cartridges(parts, sinks=sinks, base_model=base_model or (base_name if same else None))
    write_cartridge(output_dir, config, prefix)
    write_model_card(
        CardFacts(
            title="A composition of " + ", ".join(_corpus(name, f) for name, f in zip(names, facts, strict=True)),
            base_model=base_name or config.base_model_name_or_path,
            base_model_revision=config.revision,
            base_identity=next((f.base_identity for f in facts if f.base_identity), None),
            num_tokens=config.num_tokens,
            num_frozen_tokens=config.num_frozen_tokens,
            kv_bytes=_served_bytes(facts, prefix),
            parts=[_part(*each) for each in zip(names, parts, facts, strict=True)],
            composition_rule=_RULES[sinks],
            language=list(dict.fromkeys(itertools.chain.from_iterable(f.language for f in facts))),
            license=facts[0].license if len({f.license for f in facts}) == 1 else None,
            datasets=list(dict.fromkeys(itertools.chain.from_iterable(f.datasets for f in facts))),
            package_versions=current_package_versions(),
            limits=["The parts were trained apart: questions that need several texts at once are the hardest."],
        ),
        output_dir,
    )
    return output_dir


def _served_bytes(facts: list[CardFacts], prefix: KVPrefix) -> int:
    """By what a part's card says of its own size, which knows the model's dtype; as in the file, if none does."""
    states = state_bytes(prefix)  # of one size, as those of each part
    known = ((f.kv_bytes - states, f.num_tokens) for f in facts if f.kv_bytes and f.num_tokens)
    size, num_tokens = next(known, (prefix.nbytes - states, max(1, prefix.num_tokens)))
    return states + size * prefix.num_tokens // num_tokens


def _find(name: str, hub_options: dict[str, Any]) -> Path:
    if Path(name).exists():
        return find_cartridge(name)
    repo_id, _, revision = name.partition("@")
    return find_cartridge(repo_id, **{**hub_options, **({"revision": revision} if revision else {})})


def _check_identities(names: list[str], facts: list[CardFacts]) -> None:
    known = [(name, f.base_identity) for name, f in zip(names, facts, strict=True) if f.base_identity]
    for name, identity in known[1:]:
        first_name, first = known[0]
        assert first is not None and identity is not None
        compare_identities(first, identity, first_name, name)


def _one_checkpoint(facts: list[CardFacts]) -> bool:
    """Whether hashes show that all parts belong to one checkpoint, whatever they call it."""
    hashes = {f.base_identity.weights_sha256 if f.base_identity else None for f in facts}
    return len(hashes) == 1 and None not in hashes


def _corpus(name: str, facts: CardFacts) -> str:
    return facts.corpus_name or (name if is_hub_name(name.partition("@")[0]) else Path(name).resolve().name)


def _part(name: str, part: NamedCartridge, facts: CardFacts) -> Part:
    repo_id, _, revision = name.partition("@")
    known = repo_id if is_hub_name(repo_id) and not Path(name).exists() else facts.repo_id
    return Part(
        name=known or Path(name).resolve().name,
        num_tokens=part.prefix.num_tokens,
        revision=revision or None,
        corpus_name=facts.corpus_name,
        metrics=facts.metrics,
    )
