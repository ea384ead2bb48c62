"""What a self-study data set is made from, so that it can be told, compared and made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..chat import get_tokenizer
from .backends.base import Backend
from .chunking import Document
from .dialogue import SeedPrompts
from .shards import RUN_FILE, write_atomically
from .synthesis_config import SynthesisConfig

# Of what `run_identity` gives: fingerprints of two formats cannot be compared.
FORMAT = 2

# How a run is carried out, not what comes out of it (up to rounding): may differ when it is resumed.
_FREE = frozenset({"generation_batch_size"})
_PACKAGES = ("peft-cartridges", "torch", "transformers", "peft", "datasets", "vllm", "openai")


def tokenizer_fingerprint(processing_class: Any) -> str:
    """sha256 over vocabulary and chat template."""
    tokenizer = get_tokenizer(processing_class)
    content = json.dumps([sorted(tokenizer.get_vocab().items()), str(getattr(tokenizer, "chat_template", None))])
    return hashlib.sha256(content.encode()).hexdigest()


def corpus_identity(documents: Sequence[Document], name: str | None) -> dict[str, Any]:
    """Name, size and sha256 of a corpus."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.id, document.title, document.description, document.text]).encode())
    return {
        "name": name or (documents[0].id if len(documents) == 1 else f"{len(documents)} documents"),
        "documents": len(documents),
        "characters": sum(len(document.text) for document in documents),
        "sha256": digest.hexdigest(),
    }


def synthesis_arguments(args: SynthesisConfig) -> dict[str, Any]:
    """The settings of the synthesis, also where `args` has others besides."""
    return {field.name: getattr(args, field.name) for field in fields(SynthesisConfig)}


def run_identity(
    backend: Backend,
    processing_class: Any,
    args: SynthesisConfig,
    documents: Sequence[Document],
    *,
    corpus_name: str | None = None,
    seed_prompts: SeedPrompts | None = None,
) -> dict[str, Any]:
    """All that the data set depends on, JSON-ready."""
    prompts: Any = list(seed_prompts) if seed_prompts is not None and not callable(seed_prompts) else None
    if callable(seed_prompts):
        prompts = getattr(seed_prompts, "__qualname__", type(seed_prompts).__qualname__)
    return {
        "format": FORMAT,
        "base_model": backend.model_name,
        "model_fingerprint": backend.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(processing_class),
        "corpus": corpus_identity(documents, corpus_name),
        "synthesis": {**synthesis_arguments(args), "seed_prompts": prompts or list(args.seed_prompts)},
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def claim_folder(output_dir: Path, identity: dict[str, Any]) -> None:
    """Writes `self_study.json`, or checks that the one that is there is of the same run.

    Raises:
        ValueError: the folder holds another run; the message names what differs.
    """
    path = output_dir / RUN_FILE
    if not path.exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        write_run_file(output_dir, identity)
        return
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): use another `output_dir`.") from None
    if found.get("format") != identity["format"]:
        raise ValueError(
            f"`output_dir` ({output_dir}) holds a run of another version of peft-cartridges (format "
            f"{found.get('format')}, this one has {identity['format']}): use another `output_dir`, or carry it on with "
            "that version."
        )
    here, there = _comparable(identity), _comparable(found)
    if differences := [
        f"{key} ({there.get(key)!r} there, {here.get(key)!r} now)"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]:
        raise ValueError(
            f"`output_dir` ({output_dir}) holds a run with other settings: {'; '.join(differences)}. Give those "
            "settings to carry it on, or another `output_dir`."
        )


def write_run_file(output_dir: Path, identity: dict[str, Any]) -> None:
    write_atomically(output_dir / RUN_FILE, json.dumps(identity, indent=2, ensure_ascii=False).encode())


def _comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """Flat, as JSON has it, without what may differ."""
    identity = json.loads(json.dumps(identity))
    synthesis = {key: value for key, value in identity.get("synthesis", {}).items() if key not in _FREE}
    corpus = {"corpus sha256": identity.get("corpus", {}).get("sha256")}
    names = ("base_model", "model_fingerprint", "tokenizer_fingerprint")
    return {**{name: identity.get(name) for name in names}, **corpus, **synthesis}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
