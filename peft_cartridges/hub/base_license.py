"""The licence that a base model's card states, without asking the Hub."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from .model_card import is_hub_name


def read_base_license(name_or_path: str | None, revision: str | None = None) -> str | None:
    """The licence in the metadata of the base model's `README.md`, in its folder or in the cache of the Hub.

    Returns:
        The Hub's identifier (`apache-2.0`), or None where there is no such file, or it states no licence, several, or
        `other`, which means nothing without the text that it refers to.
    """
    if not name_or_path:
        return None
    path: object = Path(name_or_path) / "README.md"
    if is_hub_name(name_or_path):
        path = try_to_load_from_cache(name_or_path, "README.md", revision=revision)
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    try:
        found = ModelCard.load(path).data.get("license")
    except (ValueError, UnicodeDecodeError, yaml.YAMLError):  # no metadata, or none that can be read
        return None
    return found if isinstance(found, str) and found != "other" else None
