"""What a conversation set was made from: its identity, the address that follows from it, and what every row says of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from datasets import Dataset, IterableDataset

from ..corpus import Document
from ..model_identity import public_name

# Of what `make_identity` gives: identities of two formats cannot be compared.
FORMAT = 3

_PACKAGES = ("peft-cartridges", "torch", "transformers", "peft", "datasets", "vllm", "openai")
# Stands in every row (`origin`), so that it survives Parquet, the Hub, merges and filters.
_IN_EVERY_ROW = ("format", "address", "base_model", "model_fingerprint", "tokenizer_fingerprint")
_ROWS_LOOKED_AT = 64
# Settings that say where a set was made and by whose leave, and nothing of what is in it.
_OF_THE_MACHINE = ("engine_options", "base_url")


class CorpusDigest:
    """Counts and hashes the documents of a corpus while somebody else reads them.

    Args:
        name: Of the corpus; by default the only document's id, or how many there are.
    """

    def __init__(self, name: str | None = None) -> None:
        self._name, self._first = name, ""
        self._documents = self._characters = 0
        self._digest = hashlib.sha256()

    def reading(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            content = [document.id, document.title, document.description, document.text]
            self._digest.update(json.dumps(content).encode())
            self._first = self._first or document.id
            self._documents += 1
            self._characters += len(document.text)
            yield document

    def identity(self) -> dict[str, Any]:
        """Name, size and sha256 of what was read."""
        name = self._name or (self._first if self._documents == 1 else f"{self._documents} documents")
        return {
            "name": name,
            "documents": self._documents,
            "characters": self._characters,
            "sha256": self._digest.hexdigest(),
        }


def make_identity(
    *,
    base_model: str,
    model_fingerprint: str,
    tokenizer_fingerprint: str,
    corpus: Mapping[str, Any],
    settings: Mapping[str, Any],
    content_settings: Iterable[str],
) -> dict[str, Any]:
    """All that a set was made from, JSON-ready, and nothing that is not for others, see `publishable`.

    Args:
        base_model: Name or path of the model that wrote it.
        model_fingerprint: Tells models apart that have one name; empty where it is unknown (at a server).
        tokenizer_fingerprint: Of vocabulary and chat template.
        corpus: See `CorpusDigest.identity`.
        settings: All settings of the synthesis.
        content_settings: Names of those that decide what the conversations say. The others (how many there are, how
            they are made, which targets they get) are kept, and are no part of the address.
    """
    base_model, settings = public_name(base_model), json.loads(json.dumps(settings))
    decides = {
        "format": FORMAT,
        "model": model_fingerprint or base_model,
        "tokenizer": tokenizer_fingerprint,
        "corpus": corpus["sha256"],
        **{name: settings[name] for name in content_settings},
    }
    identity = {
        "format": FORMAT,
        "address": hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest(),
        "base_model": base_model,
        "model_fingerprint": model_fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "corpus": dict(corpus),
        "synthesis": settings,
        "decided_by": decides,
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }
    return publishable(identity)


def publishable(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance without engines' options (which may hold keys), servers' addresses and folders of this machine."""
    found = dict(provenance)
    if found.get("base_model"):
        found["base_model"] = public_name(found["base_model"])
    if (decides := found.get("decided_by") or {}).get("model"):
        found["decided_by"] = {**decides, "model": public_name(decides["model"])}
    if settings := found.get("synthesis"):
        found["synthesis"] = {name: value for name, value in settings.items() if name not in _OF_THE_MACHINE}
        if settings.get("engine_model"):
            found["synthesis"]["engine_model"] = public_name(settings["engine_model"])
    if "merged_from" in found:
        found["merged_from"] = [publishable(one) for one in found["merged_from"]]
    return found


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, str]:
    """What two identities with different addresses differ in, and how, for people."""
    mine, theirs = here.get("decided_by", {}), there.get("decided_by", {})
    return {
        key: f"{key} ({theirs.get(key)!r} there, {mine.get(key)!r} now)"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    }


def origin_of(identity: Mapping[str, Any]) -> str:
    """What the column `origin` holds: as JSON, where the row comes from."""
    return json.dumps({name: identity.get(name) for name in _IN_EVERY_ROW})


def read_provenance(dataset: Any) -> dict[str, Any]:
    """What a conversation set says of itself: all of `make_identity` and, under `report`, what came of it, where its
    description is there; otherwise `format`, `address`, `base_model`, `model_fingerprint` and `tokenizer_fingerprint`
    from its rows. Empty for a data set that says nothing of the kind.

    Raises:
        ValueError: the rows come from different models or tokenizers.
    """
    try:
        found = json.loads(dataset.info.description)
    except (AttributeError, json.JSONDecodeError, TypeError):  # none, or one for people
        found = None
    if isinstance(found, dict) and "model_fingerprint" in found:
        return found
    return _from_rows(dataset)


def read_report(dataset: Any) -> dict[str, Any]:
    """As `read_provenance`, of a set that says what came of its run.

    Raises:
        ValueError: the data set carries no such description.
    """
    found = read_provenance(dataset)
    if "report" not in found:
        raise ValueError("The data set carries no description of a self-study run in `dataset.info.description`.")
    return found


def describe(dataset: Dataset, provenance: Mapping[str, Any]) -> Dataset:
    """Writes the provenance into the data set's description."""
    dataset.info.description = json.dumps(provenance, ensure_ascii=False)
    return dataset


def _from_rows(dataset: Any) -> dict[str, Any]:
    streamed = isinstance(dataset, IterableDataset) and dataset.column_names is None  # only its rows tell
    if not streamed and "origin" not in (getattr(dataset, "column_names", None) or ()):
        return {}
    if hasattr(dataset, "data"):  # in memory or mapped from disk: all rows, without Python objects for each
        origins = dataset.select_columns("origin").with_format("arrow")[:]["origin"].unique().to_pylist()
    else:
        origins = list(dict.fromkeys(row.get("origin") for row in dataset.take(_ROWS_LOOKED_AT)))
    found = [json.loads(origin) for origin in origins if origin]
    for name in ("model_fingerprint", "tokenizer_fingerprint"):
        if len(values := {one.get(name) for one in found}) > 1:
            raise ValueError(
                f"The data set's rows come from different {'models' if name.startswith('model') else 'tokenizers'} "
                f"({', '.join(sorted({str(one.get('base_model')) for one in found}))}; `{name}` {sorted(map(str, values))}): "
                "a cartridge learns from the conversations of its own model only."
            )
    return found[0] if found else {}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
