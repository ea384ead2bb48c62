"""Putting cartridges on the Hub: stock PEFT files, a card, and nothing else unless it is asked for."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from peft import PeftModel

from ..adapter_folder import CONFIG_FILE, WEIGHTS_FILE, read_cartridge
from ..atomic_files import write_text
from ..gate import GATE_FILE
from ..hub_errors import HubError, hub_errors
from ..kv_prefix import KVPrefix
from ..tuner import CartridgeConfig, CartridgeModel
from .base_model import identify_base_model
from .card_facts import FACTS_FILE, CardFacts, current_package_versions, gate_facts, load_facts, save_facts
from .memory_figure import add_memory_figure
from .model_card import is_edited, is_hub_name, write_model_card
from .pull import IMAGE_FILE

# Fields of `CardFacts` with the name of a picture. A card links none that is not pushed with it.
_FIGURES = ("training_curve", "memory_figure")


@dataclasses.dataclass(frozen=True)
class Push:
    """What was, or (in a dry run) would be uploaded: `files` maps names to sizes in bytes."""

    repo_id: str
    revision: str | None
    private: bool | None
    files: dict[str, int]
    commit: CommitInfo | None = None

    @property
    def url(self) -> str | None:
        """Where to look at it: the commit, or the pull request."""
        return None if self.commit is None else self.commit.pr_url or self.commit.commit_url

    def __str__(self) -> str:
        head = f"{self.repo_id}{f' at {self.revision}' if self.revision else ''}"
        head += " (private)" if self.private else ""
        lines = [f"  {size:>13,}  {name}" for name, size in self.files.items()]
        return "\n".join([head, *lines, f"  {sum(self.files.values()):>13,}  bytes in all"])


def push_cartridge(
    source: str | Path | PeftModel,
    repo_id: str,
    *,
    facts: CardFacts | None = None,
    base_model: str | None = None,
    include: Iterable[str] = (),
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload cartridge",
    token: str | bool | None = None,
    dry_run: bool = False,
) -> Push:
    """Uploads a cartridge with its card: `adapter_config.json`, `adapter_model.safetensors`, `cartridge.json`,
    `gate.safetensors`, `README.md` and images beside it. Corpora, conversations, checkpoints and whatever else lies in the folder stay
    where they are, unless `include` names them.

    Args:
        source: The folder of a saved cartridge, or a model with one.
        repo_id: Its name on the Hub; made if it is not there.
        facts: For the card, over those in the folder's `cartridge.json`.
        base_model: The base model's name on the Hub, where the cartridge knows only a folder.
        include: Names of further files in the folder.
        private: Whether a repository that is made is private.
        revision: Branch to push to, made if it is not there.
        create_pr: Propose it as a pull request instead.
        commit_message, token: As in `huggingface_hub.upload_folder`.
        dry_run: Only say what would be uploaded; nothing is sent, and no network is needed.

    A `README.md` that someone wrote or edited is kept; PEFT's empty template and this package's own card are written
    anew from the facts, with a figure of the memory (`memory.png`) where they know what the text takes in context and
    matplotlib is installed.

    Raises:
        FileNotFoundError, ValueError: the folder holds no sound cartridge, or its base model has no name on the Hub.
        HubError: the Hub refuses it or cannot be reached, or a repository that was to be private is public already.
    """
    with tempfile.TemporaryDirectory() as staging:
        folder = Path(staging)
        _stage(source, folder, tuple(include))
        _complete(folder, repo_id, facts, base_model, source if isinstance(source, PeftModel) else None)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        push = Push(repo_id, revision, private, files)
        if dry_run:
            return push
        with hub_errors(repo_id, revision):
            commit = _upload(folder, push, create_pr, commit_message, HfApi(token=token))
        return dataclasses.replace(push, commit=commit)


def _stage(source: str | Path | PeftModel, folder: Path, include: tuple[str, ...]) -> None:
    """The files to upload, in a folder of their own."""
    if isinstance(source, PeftModel):
        if not isinstance(source.base_model, CartridgeModel):
            raise ValueError("`source` is a PEFT model without a cartridge.")
        if include:
            raise ValueError("`include` names files beside a saved cartridge: save the model and push the folder.")
        name = source.active_adapters[0] if hasattr(source, "active_adapters") else source.active_adapter
        source.save_pretrained(str(folder), selected_adapters=[name])
        if name != "default":  # PEFT gives every other adapter a folder of its own
            for file in (folder / name).iterdir():
                file.replace(folder / file.name)
            (folder / name).rmdir()
        return
    read_cartridge(source)
    for extra in include:
        if not (Path(source) / extra).is_file() or Path(extra).name != extra:
            raise FileNotFoundError(f"`include` names {extra!r}, which is no file in {source}.")
    for file in Path(source).iterdir():
        wanted = file.name in (CONFIG_FILE, WEIGHTS_FILE, FACTS_FILE, GATE_FILE, "README.md", *include)
        if file.is_file() and (wanted or IMAGE_FILE.fullmatch(file.name)):
            shutil.copyfile(file, folder / file.name)


def _complete(
    folder: Path, repo_id: str, facts: CardFacts | None, base_model: str | None, model: PeftModel | None
) -> None:
    """Card, facts, and a base model that others can find."""
    config, prefix = read_cartridge(folder)
    facts = complete_facts(facts or load_facts(folder), config, prefix, model)
    name = find_base_name(
        [base_model, facts.base_model, config.base_model_name_or_path], "pass `base_model='user/name'`"
    )
    facts = dataclasses.replace(facts, repo_id=repo_id, base_model=name, gate=gate_facts(folder))
    edited = is_edited(folder)
    if not edited:
        facts = add_memory_figure(facts, folder)
    missing = {figure: None for figure in _FIGURES if not (folder / (getattr(facts, figure) or "")).is_file()}
    facts = dataclasses.replace(facts, **cast(dict[str, Any], missing))
    if config.base_model_name_or_path != name:
        path = folder / CONFIG_FILE
        fields = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": name}
        write_text(path, json.dumps(fields, indent=2, sort_keys=True))
    if edited:
        save_facts(facts, folder)
    else:
        write_model_card(facts, folder)


def find_base_name(names: Iterable[str | None], remedy: str) -> str:
    """The first of the names that is one on the Hub.

    Raises:
        ValueError: there is none; the message ends with `remedy`.
    """
    known = [name for name in names if name]
    if found := next((name for name in known if is_hub_name(name)), None):
        return found
    raise ValueError(
        "The base model of the cartridge has no name on the Hub (known: "
        f"{', '.join(map(repr, known)) or 'none'}), so nobody could load it: {remedy}."
    )


def complete_facts(
    facts: CardFacts, config: CartridgeConfig, prefix: KVPrefix, model: PeftModel | None = None
) -> CardFacts:
    """The facts, and what the cartridge itself tells where they are silent."""
    found: dict[str, Any] = {
        "num_tokens": config.num_tokens,
        "num_frozen_tokens": config.num_frozen_tokens,
        "kv_bytes": served_bytes(prefix, prefix.dtype if model is None else model.dtype),
        "base_model": config.base_model_name_or_path,
        "base_model_revision": config.revision,
        "package_versions": current_package_versions(),
        "base_identity": None if model is None or facts.base_identity else identify_base_model(model),
    }
    return dataclasses.replace(facts, **{key: value for key, value in found.items() if not getattr(facts, key)})


def served_bytes(prefix: KVPrefix, dtype: torch.dtype) -> int:
    """Of a cartridge as it is served: files keep float32, a model computes in its own dtype. States stay as they are."""
    keys_and_values = sum(tensor.numel() for tensor in (*prefix.keys, *prefix.values))
    return keys_and_values * dtype.itemsize + state_bytes(prefix)


def state_bytes(prefix: KVPrefix) -> int:
    return sum(tensor.numel() * tensor.element_size() for state in prefix.states for tensor in state.values())


def _upload(folder: Path, push: Push, create_pr: bool, commit_message: str, api: HfApi) -> CommitInfo:
    api.create_repo(push.repo_id, private=push.private, exist_ok=True)
    if push.private:
        refuse_public(push.repo_id, api)
    if push.revision and not create_pr and not push.revision.startswith("refs/pr/"):
        api.create_branch(push.repo_id, branch=push.revision, exist_ok=True)
    return api.create_commit(
        push.repo_id,
        operations=[CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in push.files],
        commit_message=commit_message,
        revision=push.revision,
        create_pr=create_pr,
    )


def refuse_public(repo_id: str, api: HfApi) -> None:
    """Raises:
    HubError: the repository is public.
    """
    if api.model_info(repo_id).private is False:
        raise HubError(f"`{repo_id}` exists and is public: make it private in its settings, or push elsewhere.")
