"""`model.push_to_hub(…)` for models with a cartridge: the same call as ever, with a card that tells what it is.

`push_to_hub` comes from transformers, which writes an empty template of its own over the card that PEFT saved, and has
no place to put another one. So the method is wrapped, for cartridges alone.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModel

from .tuner import CartridgeModel

_PASSED_ON = ("private", "revision", "create_pr", "commit_message", "token", "facts", "base_model")


def wrap_push_to_hub() -> None:
    """Wraps `PeftModel.push_to_hub` once."""
    if not hasattr(PeftModel.push_to_hub, "__wrapped__"):
        PeftModel.push_to_hub = _with_card(PeftModel.push_to_hub)  # type: ignore[method-assign]


def _with_card(push_to_hub: Any) -> Any:
    @functools.wraps(push_to_hub)
    def wrapper(self: PeftModel, repo_id: str, **options: Any) -> Any:
        # Several adapters are pushed as PEFT does it, each in a folder of its own: no one card fits them.
        if not isinstance(self.base_model, CartridgeModel) or len(self.peft_config) > 1:
            return push_to_hub(self, repo_id, **options)
        from .hub import CardFacts, push_cartridge

        facts = options.pop("facts", None) or CardFacts()
        facts.tags = list(dict.fromkeys([*facts.tags, *(options.pop("tags", None) or [])]))
        passed_on = {name: options[name] for name in _PASSED_ON if options.get(name) is not None}
        return push_cartridge(self, repo_id, facts=facts, **passed_on).commit

    return wrapper
