"""Contexts and turns, with templates of every kind."""

from __future__ import annotations

import pytest

from peft_cartridges.chat import encode_context, encode_preamble, encode_turns, render_turns
from tests.tiny_models import tiny_tokenizer

_TURN = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
_DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<system> old text <end> {% endif %}" + _TURN
_MERGED_SYSTEM = (  # the system message becomes a part of the first user message, as in Gemma 3
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + ' ' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<{{ m['role'] }}> {{ first if loop.first else '' }}{{ m['content'] }} <end> {% endfor %}"
)
_NO_SYSTEM = (  # refuses a system message, as Gemma 2
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + _TURN
)
_NEEDS_USER = (  # refuses a conversation without a user message
    "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ raise_exception('No user query found') }}{% endif %}" + _TURN
)
TEMPLATES = {
    "plain": _TURN,
    "default system": _DEFAULT_SYSTEM,
    "merged system": _MERGED_SYSTEM,
    "no system": _NO_SYSTEM,
    "needs a user": _NEEDS_USER,
}
MESSAGES = [{"role": "user", "content": "what is the sea ?"}, {"role": "assistant", "content": "the sea is blue ."}]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_context_and_turns_make_up_the_whole_conversation(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    text = "the old captain tells the keeper . the ship is red ."
    ids = encode_context(tokenizer, text) + encode_turns(tokenizer, MESSAGES)
    try:
        whole = tokenizer.apply_chat_template([{"role": "system", "content": text}, *MESSAGES], tokenize=False)
    except Exception:
        first, *rest = MESSAGES
        merged = {"role": "user", "content": f"{text}\n\n{first['content']}"}
        whole = tokenizer.apply_chat_template([merged, *rest], tokenize=False)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_turns_do_not_depend_on_the_context(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    turns = render_turns(tokenizer, MESSAGES)
    assert turns.count("what is the sea ?") == 1
    assert "context" not in turns and turns.rstrip().endswith("the sea is blue . <end>")


def test_the_preamble_is_what_stands_in_front_of_the_turns_without_a_system_message() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = _DEFAULT_SYSTEM
    ids = encode_preamble(tokenizer) + encode_turns(tokenizer, MESSAGES)
    assert ids == tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    tokenizer.chat_template = _TURN
    assert encode_preamble(tokenizer) == []


def test_plain_text_where_there_is_no_template() -> None:
    tokenizer = tiny_tokenizer()
    assert encode_context(tokenizer, "the sea", chat_template=False) == tokenizer("the sea")["input_ids"]
    tokenizer.chat_template = None
    assert encode_context(tokenizer, "the sea") == tokenizer("the sea")["input_ids"]
    with pytest.raises(ValueError, match="no chat template"):
        encode_turns(tokenizer, MESSAGES)


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`text` is empty"):
        encode_context(tiny_tokenizer(), text)
