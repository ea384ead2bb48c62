"""`load_cartridge`: base model, cartridge and tokenizer in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..adapter_folder import read_cartridge
from ..chat import with_cartridge_chat_template
from .base_model import check_base_model
from .card_facts import load_facts
from .errors import HubError
from .model_card import is_hub_name
from .pull import find_cartridge


def load_cartridge(
    name_or_path: str | Path,
    *,
    base_model: str | Path | PreTrainedModel | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    is_trainable: bool = False,
    **model_kwargs: Any,
) -> tuple[PeftModel, Any]:
    """A cartridge on its base model, ready to generate, and the base model's tokenizer (with the chat template for
    conversations behind a cartridge, where it was trained without the default system prompt).

    ```python
    model, tokenizer = load_cartridge("user/cartridge")
    ```

    Args:
        name_or_path: The cartridge: a folder, or a name on the Hub.
        base_model: Instead of the base model that the cartridge names: another name or folder of it, or the model
            itself, where it is loaded already.
        revision: Of the cartridge: branch, tag or commit. The base model's own revision is in the cartridge.
        token, cache_dir, local_files_only: As in `from_pretrained`, for the cartridge and its base model.
        is_trainable: Whether to go on training it.
        model_kwargs: Of `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, `quantization_config`, …).

    Only safetensors are loaded, and no code of either repository is run.

    Raises:
        ValueError: the cartridge is damaged, or does not fit the base model (see `check_base_model`).
        HubError: the Hub has no such cartridge or base model, refuses it, or cannot be reached.
    """
    hub_options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    if model_kwargs.get("trust_remote_code"):
        raise ValueError("`trust_remote_code` is not for here: load such a model yourself and pass it as `base_model`.")
    folder = find_cartridge(name_or_path, revision=revision, **hub_options)
    config, _ = read_cartridge(folder)
    if isinstance(base_model, PreTrainedModel):
        if model_kwargs:
            raise ValueError(f"`base_model` is loaded already: leave out {', '.join(sorted(model_kwargs))}.")
        model, name, base_revision = base_model, str(base_model.name_or_path), None
    else:
        facts = load_facts(folder)
        name = str(base_model or "") or facts.base_model or config.base_model_name_or_path or ""
        base_revision = None if base_model is not None else config.revision or facts.base_model_revision
        _check_base_name(name, given=base_model is not None, is_local=Path(name_or_path).is_dir(), cartridge=folder)
        options = {"dtype": "auto", "use_safetensors": True, **hub_options, **model_kwargs}
        model = _loaded(name, AutoModelForCausalLM.from_pretrained, revision=base_revision or "main", **options)
    check_base_model(model, folder)
    tokenizer = _loaded(name, AutoTokenizer.from_pretrained, revision=base_revision or "main", **hub_options)
    if load_facts(folder).recipe.get("default_system_prompt") is False:
        tokenizer = with_cartridge_chat_template(tokenizer)
    peft_model = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    return (peft_model.train() if is_trainable else peft_model.eval()), tokenizer


def _check_base_name(name: str, *, given: bool, is_local: bool, cartridge: Path) -> None:
    if not name:
        raise ValueError(f"{cartridge} does not say which base model it belongs to: pass `base_model=…`.")
    # A repository must not choose which folder of this machine is read.
    if not given and not is_local and not is_hub_name(name):
        raise ValueError(
            f"The cartridge names the base model {name!r}, which is no name on the Hub: pass `base_model=…`."
        )


def _loaded(name: str, load: Any, **options: Any) -> Any:
    try:
        return load(name, **options)
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__, GatedRepoError):
            message = "is gated: ask for access on its page, then log in with `hf auth login`"
        else:
            message = "could not be loaded: " + (str(error).strip().splitlines() or ["unknown error"])[0]
        raise HubError(f"The base model {name!r} {message}") from error
