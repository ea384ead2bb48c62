"""The chat template for conversations behind a cartridge."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from peft_cartridges import cartridge_chat_template
from peft_cartridges.chat import ChatCodec, with_cartridge_chat_template
from tests.chat_templates import CHAT_TEMPLATES, CHAT_TOKENIZERS
from tests.tiny_models import tiny_tokenizer

MESSAGES = [
    {"role": "user", "content": "What is the sea ?"},
    {"role": "assistant", "content": "The sea is blue ."},
    {"role": "user", "content": "And the ship ?"},
]

# Where a system message is a part of the first user message, the turns need its opening.
WITHIN_THE_FIRST_MESSAGE = {"Gemma 2", "Gemma 3", "Mistral v1", "Mistral v3", "Llama 2"}


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_it_gives_the_turns_alone(template: str) -> None:
    tokenizer = next(iter(CHAT_TOKENIZERS.values()))
    tokenizer.chat_template = CHAT_TEMPLATES[template]
    behind = with_cartridge_chat_template(tokenizer)
    if template in WITHIN_THE_FIRST_MESSAGE:
        assert behind is tokenizer
        return
    assert ChatCodec(None, behind).preamble == []
    for asked in (False, True):
        turns = ChatCodec(None, tokenizer).encode_turns(MESSAGES, add_generation_prompt=asked)
        assert ChatCodec(None, behind).encode_turns(MESSAGES, add_generation_prompt=asked) == turns
        rendered = behind.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=asked)
        whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=asked)
        assert whole.endswith(rendered) and rendered.count("sea") == 2
    assert ChatCodec(None, behind).encode_context("A text .") == ChatCodec(None, tokenizer).encode_context("A text .")
    assert tokenizer.chat_template == CHAT_TEMPLATES[template]


def test_a_system_message_of_the_users_own_stays() -> None:
    tokenizer = next(iter(CHAT_TOKENIZERS.values()))
    tokenizer.chat_template = CHAT_TEMPLATES["ChatML with a default"]
    messages = [{"role": "system", "content": "Be brief ."}, *MESSAGES]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert with_cartridge_chat_template(tokenizer).apply_chat_template(messages, tokenize=False) == expected


def test_it_is_saved_with_the_tokenizer_and_is_not_wrapped_twice(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATES["ChatML with a default"]
    behind = with_cartridge_chat_template(tokenizer)
    behind.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert ChatCodec(None, loaded).preamble == []
    assert cartridge_chat_template(loaded) == behind.chat_template


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        cartridge_chat_template(tokenizer)
    assert with_cartridge_chat_template(tokenizer) is tokenizer
