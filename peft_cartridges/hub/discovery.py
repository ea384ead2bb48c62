"""Finding cartridges on the Hub by the tags of their cards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub import HfApi, ModelInfo

from ..hub_errors import hub_errors
from .model_card import CARD_TAGS


def list_cartridges(
    *,
    base_model: str | None = None,
    search: str | None = None,
    author: str | None = None,
    tags: list[str] | None = None,
    sort: Any = None,
    limit: int | None = None,
    token: str | bool | None = None,
) -> Iterator[ModelInfo]:
    """The cartridges on the Hub, as `huggingface_hub.list_models` gives models.

    Args:
        base_model: Only those for this base model (its name on the Hub).
        search: Only those with these words in their names.
        author: Only those of this user or organization.
        tags: Only those with all these tags too (a language, a licence as `license:mit`, your own).
        sort, limit, token: As in `huggingface_hub.list_models`.

    Raises:
        HubError: the Hub cannot be reached, or refuses the request.
    """
    wanted = [CARD_TAGS[0], *([f"base_model:adapter:{base_model}"] if base_model else []), *(tags or [])]
    with hub_errors(base_model or "models"):
        found = HfApi(token=token).list_models(
            filter=wanted, search=search, author=author, sort=sort, limit=limit, full=True
        )
        yield from found
