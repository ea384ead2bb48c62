"""What serving must know about the base model, none of it the weights: its shape, its tokenizer, its silent tokens."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..chat import cartridge_chat_template
from ..hub import check_base_model
from ..hub.card_facts import load_facts


class BaseModelFacts:
    """The base model of a server, without its weights.

    Args:
        name: Its name on the Hub, or its folder.
        revision: Branch, tag or commit.
        trust_remote_code: As in `from_pretrained`.
    """

    def __init__(self, name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.name = name
        self.config = AutoConfig.from_pretrained(name, **options)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
        with torch.device("meta"):
            self._empty = AutoModelForCausalLM.from_config(self.config, trust_remote_code=trust_remote_code)
        self._empty.name_or_path = name
        self._template: str | None = None

    def check(self, folder: str | Path) -> list[str]:
        """Compares the cartridge in a folder with this model.

        Returns:
            What is doubtful about it.

        Raises:
            ValueError: it belongs to another model.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_base_model(self._empty, folder, hash_weights=False)
        return [str(warning.message) for warning in caught]

    def chat_template(self, folder: str | Path) -> str | None:
        """The chat template that the cartridge in a folder was trained behind; None where it is the tokenizer's own."""
        if load_facts(folder).recipe.get("default_system_prompt") is not False:
            return None
        if self._template is None:
            self._template = cartridge_chat_template(self.tokenizer)
        return self._template

    def placeholder_alphabet(self) -> list[int]:
        """Two token ids that no answer contains: what the model's vocabulary has beyond the tokenizer's, or special
        tokens that end nothing. Placeholders are made of them, so that a penalty on the prompt's tokens changes
        nothing."""
        text = self.config.get_text_config(decoder=True)
        spare = list(range(len(self.tokenizer), text.vocab_size))[-2:]
        if len(spare) == 2:
            return spare
        used = {value for name, value in _token_ids(self.config.to_dict()) if name != "pad_token_id"}
        used |= {self.tokenizer.eos_token_id}
        marks = {self.tokenizer.convert_tokens_to_ids(word) for word in _END_OF_TURN} - {None}
        special = [index for index in self.tokenizer.all_special_ids if index not in used | marks]
        special = [index for index in special if index < text.vocab_size]
        ordinary = [index for index in range(text.vocab_size - 1, -1, -1) if index not in used | marks]
        return sorted((special[-2:] + ordinary)[:2])


# Ends of turns that some tokenizers list among their special tokens, without naming them the end of a sequence.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<turn|>")


def _token_ids(config: dict[str, Any]) -> list[tuple[str, int]]:
    """Every `…_token_id` of a configuration, nested ones included."""
    found: list[tuple[str, int]] = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += _token_ids(value)
        elif str(name).endswith(("_token_id", "_token_ids", "_token_index")):
            found += [(name, one) for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]
    return found
