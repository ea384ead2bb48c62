"""Getting cartridges from the Hub: only the files of a cartridge, and checked before anyone uses them."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from ..adapter_folder import CONFIG_FILE, WEIGHTS_FILE, missing_weights, read_cartridge
from ..gate import GATE_FILE, load_gate
from ..hub_errors import HubError, hub_errors, is_network_error
from .card_facts import FACTS_FILE
from .model_card import is_hub_name

# Figures of the card, beside it.
IMAGE_FILE = re.compile(r"[\w-][\w.-]*\.(png|jpe?g|gif|webp|svg)", re.IGNORECASE)
CARTRIDGE_FILES = (CONFIG_FILE, WEIGHTS_FILE, FACTS_FILE, GATE_FILE, "README.md")
_MAX_BYTES = 32 << 30


def pull_cartridge(
    repo_id: str,
    *,
    revision: str | None = None,
    output_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    max_bytes: int = _MAX_BYTES,
) -> Path:
    """Fetches a cartridge and checks it; what is in the cache already is not fetched again.

    Only `adapter_config.json`, `adapter_model.safetensors`, `cartridge.json`, `gate.safetensors`, the card and images
    beside it are fetched, whatever else the repository holds. In offline mode, or when the Hub cannot be reached, the cache serves.

    Args:
        repo_id: The cartridge's name on the Hub.
        revision: Branch, tag or commit.
        output_dir: Copy the files here; the folder must be empty or missing.
        cache_dir, token, local_files_only, force_download: As in `huggingface_hub.snapshot_download`.
        max_bytes: Refuse larger cartridges, before they are fetched.

    Returns:
        The folder with the files: `output_dir`, or the one in the cache.

    Raises:
        HubError: no such repository, revision or permission, or no network and nothing in the cache.
        FileNotFoundError: the repository is no cartridge.
        ValueError: it has pickled weights only, is larger than `max_bytes`, or its files are damaged.
    """
    if output_dir is not None and Path(output_dir).exists() and any(Path(output_dir).iterdir()):
        raise ValueError(f"`output_dir` ({output_dir}) is not empty: name another folder, or empty it.")
    options: dict[str, Any] = {"revision": revision, "token": token}
    names: list[str] | None = None
    with hub_errors(repo_id, revision):
        if not local_files_only and not constants.is_offline_mode():
            names = _names_to_fetch(repo_id, max_bytes, options)
        folder = Path(
            snapshot_download(
                repo_id,
                **options,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
                allow_patterns=[re.sub(r"([\[\]*?])", r"[\1]", name) for name in names or CARTRIDGE_FILES],
            )
        )
    if not (folder / CONFIG_FILE).exists() and names is None:
        raise HubError(f"`{repo_id}` is in the cache without its {CONFIG_FILE}: fetch it once while online.")
    read_cartridge(folder)
    load_gate(folder)
    return folder if output_dir is None else _copy(folder, Path(output_dir))


def find_cartridge(name_or_path: str | Path, **options: Any) -> Path:
    """The folder of a cartridge: `name_or_path` itself if it is one, else what `pull_cartridge` gives for the name.

    Raises:
        FileNotFoundError: it looks like a path, and nothing is there.
        The errors of `pull_cartridge`.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if not is_hub_name(str(name_or_path)):
        raise FileNotFoundError(f"{str(name_or_path)!r} is neither a folder nor a name on the Hub (`user/name`).")
    return pull_cartridge(str(name_or_path), **options)


def _names_to_fetch(repo_id: str, max_bytes: int, options: dict[str, Any]) -> list[str] | None:
    """What of the repository makes the cartridge; None where the Hub cannot be asked and the cache must do."""
    try:
        # Unlike the other ways to list files, this one gives up at once where there is no network.
        info = HfApi(token=options["token"]).model_info(repo_id, revision=options["revision"], files_metadata=True)
    except RevisionNotFoundError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code < 500 and error.response.status_code != 429:
            raise
        return None  # the Hub has trouble: snapshot_download serves from the cache, or raises the same error again
    except Exception as error:
        if not is_network_error(error):
            raise
        return None
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    if CONFIG_FILE not in sizes:
        raise FileNotFoundError(f"`{repo_id}` is no cartridge: it has no {CONFIG_FILE}.")
    if WEIGHTS_FILE not in sizes:
        raise missing_weights(f"`{repo_id}`", list(sizes))
    names = [name for name in sizes if name in CARTRIDGE_FILES or IMAGE_FILE.fullmatch(name)]
    total = sum(sizes[name] or 0 for name in names)
    if total > max_bytes:
        raise ValueError(
            f"`{repo_id}` has {total:,} bytes, more than `max_bytes` ({max_bytes:,}): raise it if you trust the source."
        )
    return names


def _copy(folder: Path, output_dir: Path) -> Path:
    """Copies (the cache has links) into a folder that appears when it is complete."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as staging:
        inner = Path(staging) / "cartridge"
        inner.mkdir()
        for file in folder.iterdir():
            if file.is_file():
                shutil.copyfile(file, inner / file.name)
        if output_dir.exists():
            output_dir.rmdir()  # empty, as checked before
        os.replace(inner, output_dir)
    return output_dir
