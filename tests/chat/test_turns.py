"""Contexts, preambles and turns, with templates of every kind: together they are what the chat template gives."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_cartridges.chat import ChatCodec
from tests.chat_templates import CHAT_TEMPLATES, CHAT_TOKENIZERS
from tests.tiny_models import tiny_tokenizer

# No system role, or one that puts the text into the last user message, where it cannot stand in front of all turns.
WITHOUT_SYSTEM = {"Gemma 2", "Mistral v1", "Mistral v3"}
MESSAGES = [
    {"role": "user", "content": "What is the sea ?"},
    {"role": "assistant", "content": "The sea is blue ."},
    {"role": "user", "content": "And the ship ?"},
]
TEXT = "The old captain tells the keeper . The ship is red ."

templates = pytest.mark.parametrize("template", CHAT_TEMPLATES)
tokenizers = pytest.mark.parametrize("tokenizer", CHAT_TOKENIZERS)
drawn = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
# A message's first character decides whether tokenizers join it with what stands in front.
contents = st.lists(
    st.sampled_from(["What", "the", "captain", "1234", "?", "(a", "“aye”", "é", "海", "<|", "[INST]", "_x", "a\n\nb"]),
    min_size=1,
    max_size=5,
).map(" ".join)


def _tokenizer(name: str, template: str) -> Any:
    tokenizer = CHAT_TOKENIZERS[name]
    tokenizer.chat_template = CHAT_TEMPLATES[template]
    return tokenizer


def _messages(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def _about(text: str, messages: list[dict[str, str]], template: str) -> list[dict[str, str]]:
    """The conversation with a text in context."""
    if template not in WITHOUT_SYSTEM:
        return [{"role": "system", "content": text}, *messages]
    first, *rest = messages
    return [{"role": "user", "content": f"{text}\n\n{first['content']}"}, *rest]


@templates
@tokenizers
@drawn
@given(texts=st.lists(contents, min_size=1, max_size=4))
def test_preamble_and_turns_are_what_the_chat_template_gives(tokenizer: str, template: str, texts: list[str]) -> None:
    chat, messages = _tokenizer(tokenizer, template), _messages(texts)
    for asked in (False, True):
        ids = ChatCodec(None, chat).preamble + ChatCodec(None, chat).encode_turns(messages, add_generation_prompt=asked)
        assert ids == chat.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=asked)


@templates
@tokenizers
@drawn
@given(text=contents, texts=st.lists(contents, min_size=1, max_size=4))
def test_context_and_turns_read_as_the_chat_template_renders(
    tokenizer: str, template: str, text: str, texts: list[str]
) -> None:
    chat, messages = _tokenizer(tokenizer, template), _messages(texts)
    ids = ChatCodec(None, chat).encode_context(text) + ChatCodec(None, chat).encode_turns(messages)
    rendered = chat.apply_chat_template(_about(text, messages, template), tokenize=False)
    whole = chat(rendered, add_special_tokens=False)["input_ids"]
    if tokenizer == "bytes":  # there the border is always between two tokens
        assert ids == whole
    # Elsewhere a token that begins with a space may begin the turns, which is not there behind a merged context.
    read, expected = chat.decode(ids), chat.decode(whole)
    assert read.replace(" ", "") == expected.replace(" ", "")


@pytest.mark.parametrize(
    ("template", "preamble", "opening"),
    [
        ("ChatML", "", "<|im_start|>user\nWhat"),
        ("ChatML with a default", "<|im_start|>system\nBe kind.<|im_end|>\n", "<|im_start|>user\nWhat"),
        ("ChatML that needs a user", "", "<|im_start|>user\nWhat"),
        ("Zephyr", "", "<|user|>\nWhat"),
        ("Gemma 2", "<s><start_of_turn>user\n", "What"),
        ("Gemma 3", "<s><start_of_turn>user\n", "What"),
        ("Mistral v1", "<s>[INST] ", "What"),
        ("Mistral v3", "<s>[INST] ", "What"),
        ("Llama 2", "<s>[INST] ", "What"),
    ],
)
def test_the_turns_begin_with_the_user_or_where_a_merged_context_ends(
    template: str, preamble: str, opening: str
) -> None:
    assert ChatCodec(None, _tokenizer("bytes", template)).render_turns(MESSAGES).startswith(opening)
    assert CHAT_TOKENIZERS["bytes"].decode(ChatCodec(None, _tokenizer("bytes", template)).preamble) == preamble
    # Where a token holds the space and the word behind it, it belongs to the turns.
    words = _tokenizer("byte-level BPE", template)
    assert words.decode(ChatCodec(None, words).preamble) == preamble.rstrip(" ")


@templates
def test_what_begins_with_a_line_break_reads_right_too(template: str) -> None:
    """It may be one token with the line break in front of it, so that the ids are not the preamble's."""
    chat = _tokenizer("byte-level BPE", template)
    messages = [{"role": "user", "content": "\n\nWhat ?"}]
    ids = ChatCodec(None, chat).preamble + ChatCodec(None, chat).encode_turns(messages)
    expected = chat.apply_chat_template(messages, tokenize=False)
    assert chat.decode(ids).replace(" ", "") == expected.replace(" ", "")


@templates
def test_a_context_stands_in_front_of_all_turns(template: str) -> None:
    chat = _tokenizer("bytes", template)
    read = chat.decode(ChatCodec(None, chat).encode_context(TEXT) + ChatCodec(None, chat).encode_turns(MESSAGES))
    places = [read.index(part) for part in (TEXT, *(message["content"] for message in MESSAGES))]
    assert places == sorted(places)


def test_a_conversation_that_begins_with_no_user_message_is_refused() -> None:
    chat = _tokenizer("bytes", "ChatML")
    for role in ("assistant", "system"):
        with pytest.raises(ValueError, match=r"`messages` must begin with a user message, .*<\|im_start\|>user"):
            ChatCodec(None, chat).encode_turns([{"role": role, "content": "Aye."}, *MESSAGES])


def test_plain_text_where_there_is_no_template() -> None:
    tokenizer = tiny_tokenizer()
    assert (
        ChatCodec(None, tokenizer).encode_context("the sea", chat_template=False) == tokenizer("the sea")["input_ids"]
    )
    tokenizer.chat_template = None
    assert ChatCodec(None, tokenizer).encode_context("the sea") == tokenizer("the sea")["input_ids"]
    for encode in (
        lambda: ChatCodec(None, tokenizer).encode_turns(MESSAGES),
        lambda: ChatCodec(None, tokenizer).preamble,
    ):
        with pytest.raises(ValueError, match="no chat template"):
            encode()


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`text` is empty"):
        ChatCodec(None, tiny_tokenizer()).encode_context(text)
