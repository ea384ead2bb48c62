"""`CardFacts`: what is known about a cartridge beyond its weights, and the file `cartridge.json` that keeps it.

The model card is made from these facts, a composition quotes those of its parts, and a base model is checked against
them before a cartridge is loaded. Stock PEFT does not look at the file.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..atomic_files import write_text
from ..gate import load_gate

FACTS_FILE = "cartridge.json"
_FORMAT_VERSION = 1
_MAX_BYTES = 1 << 20
_T = TypeVar("_T")


@dataclass
class Metric:
    """One measured value.

    Args:
        name: What was measured, for people: "Gold-answer NLL (nats per token)".
        value: The value.
        dataset: What it was measured on: "40 questions on the handbook".
        type: The metric's identifier in the Hub's evaluation results; made from `name` where it is missing.
        command: The command that printed it.
        note: What it should be read against: "3.76 without context, 2.31 with the text in context".
    """

    name: str
    value: float
    dataset: str = "questions on the corpus"
    type: str | None = None
    command: str | None = None
    note: str | None = None


@dataclass
class Part:
    """One cartridge of a composition, in its order."""

    name: str
    num_tokens: int | None = None
    revision: str | None = None
    corpus_name: str | None = None
    metrics: list[Metric] = field(default_factory=list)


@dataclass
class GateFacts:
    """The gate beside the cartridge.

    Args:
        words: How many words of the text it knows.
        general_rejected: Of the requests that set its threshold, the share that it rejects.
        num_general: How many these were.
    """

    words: int
    general_rejected: float
    num_general: int


@dataclass
class BaseIdentity:
    """What tells one base model from another; see `base_model.identify_base_model`. Numbers are of the text model."""

    name: str | None = None
    revision: str | None = None
    model_type: str | None = None
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    rope_parameters: dict[str, Any] | None = None
    weights_sha256: str | None = None


@dataclass
class CardFacts:
    """Facts for `build_model_card`. All are optional: what is missing is left out of the card.

    Args:
        title: Heading of the card; made from the corpus's name where it is missing.
        repo_id: The cartridge's name on the Hub; set by `push_cartridge`.
        base_model, base_model_revision: The base model's name on the Hub, and the commit that was used.
        base_model_license: What the base model's own card states, for people.
        base_identity: What a base model is checked against before the cartridge is loaded on it.
        corpus_name, corpus_tokens, corpus_sha256: The text that the cartridge stands in for. The text itself is never
            uploaded.
        num_tokens, num_frozen_tokens: Length of the cartridge, and how many of its first tokens were not trained.
        kv_bytes, in_context_kv_bytes: Memory of the cartridge's keys and values, and of the whole text's in context.
        recipe: Settings worth knowing to make it again, in the order in which the card shows them.
        num_conversations: Conversations trained on.
        off_context_conversations: How many of them are general ones, whose teacher had no text.
        seed_types: How many of them came from each kind of seed prompt.
        filters: How many were dropped, by reason.
        metrics: What was measured, each with its command.
        training_curve, memory_figure: File names of images beside the card.
        license: Licence of the cartridge, as the Hub writes it ("apache-2.0"): it holds what the corpus says, so
            the corpus's licence has a say in it.
        language: Languages of the corpus ("en").
        datasets: Data sets on the Hub that it was made from.
        package_versions: Versions of the packages that made it.
        parts: The cartridges that a composition was made of, in order.
        composition_rule: How they were joined.
        limits: What a user should know before relying on it, a sentence each.
        tags: Further tags for the Hub.
        question: A question that the cartridge can answer, for the usage block.
        gate: Of the gate beside it, if there is one.
    """

    title: str | None = None
    repo_id: str | None = None
    base_model: str | None = None
    base_model_revision: str | None = None
    base_model_license: str | None = None
    base_identity: BaseIdentity | None = None
    corpus_name: str | None = None
    corpus_tokens: int | None = None
    corpus_sha256: str | None = None
    num_tokens: int | None = None
    num_frozen_tokens: int | None = None
    kv_bytes: int | None = None
    in_context_kv_bytes: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    num_conversations: int | None = None
    off_context_conversations: int | None = None
    seed_types: dict[str, int] = field(default_factory=dict)
    filters: dict[str, int] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    training_curve: str | None = None
    memory_figure: str | None = None
    license: str | None = None
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    package_versions: dict[str, str] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    composition_rule: str | None = None
    limits: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    question: str | None = None
    gate: GateFacts | None = None


def gate_facts(folder: str | Path) -> GateFacts | None:
    """Of the gate in a cartridge's folder.

    Raises:
        ValueError: as `load_gate`.
    """
    gate = load_gate(folder)
    return None if gate is None else GateFacts(len(gate.words), gate.general_rejected, gate.num_general)


def save_facts(facts: CardFacts, folder: str | Path) -> Path:
    """Writes `cartridge.json` into `folder`; what is unknown is left out."""
    known = _without_unknown(dataclasses.asdict(facts))
    path = Path(folder) / FACTS_FILE
    write_text(path, json.dumps({"format_version": _FORMAT_VERSION, **known}, indent=2, default=str) + "\n")
    return path


def load_facts(folder: str | Path) -> CardFacts:
    """The facts beside an adapter; all unknown where there is no `cartridge.json` (stock PEFT writes none).

    Raises:
        ValueError: the file is there, but is not what `save_facts` writes.
    """
    path = Path(folder) / FACTS_FILE
    if not path.is_file():
        return CardFacts()
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_BYTES} bytes: it is not this package's `{FACTS_FILE}`.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it, or get the folder anew.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: remove it, or get the folder anew.")
    version = found.pop("format_version", None)
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, this package reads {_FORMAT_VERSION}: upgrade peft-cartridges."
        )
    return _build(CardFacts, found, str(path))


def current_package_versions() -> dict[str, str]:
    """Versions of the installed packages that have a say in what a cartridge becomes."""
    names = ("peft-cartridges", "peft", "transformers", "torch", "trl", "datasets")
    return {
        name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name.replace("-", "_"))
    }


def _without_unknown(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_unknown(part) for key, part in value.items() if part is not None and part not in ({}, [])}
    if isinstance(value, list):
        return [_without_unknown(part) for part in value]
    return value


def _build(cls: type[_T], found: Any, where: str) -> _T:
    """`cls` from parsed JSON, every value of the type that its field says. Unknown fields are left out, so that files
    of later versions can still be read."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object, got {type(found).__name__}.")
    hints = typing.get_type_hints(cls)
    known = {key: _checked(hints[key], value, f"{where}: `{key}`") for key, value in found.items() if key in hints}
    try:
        return cls(**known)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f"{where}: {error}.") from error


def _checked(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _checked(arguments[0], value, where)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin is list and isinstance(value, list):
        return [_checked(arguments[0], part, where) for part in value]
    if origin is dict and isinstance(value, dict):
        return {str(key): _checked(arguments[1], part, where) for key, part in value.items()}
    expected = (int, float) if hint is float else hint
    if origin is None and isinstance(value, expected) and not isinstance(value, bool):
        return value
    raise ValueError(f"{where} should be {getattr(hint, '__name__', hint)}, got {type(value).__name__}.")
