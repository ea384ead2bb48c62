"""The templates of well-known models themselves, as the installed TRL carries them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerFast

from peft_cartridges.chat import ChatCodec, with_cartridge_chat_template
from tests.chat_templates import byte_level

FILES = {
    path.stem: path
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.endswith("_training")  # TRL's own
}
QUESTIONS, ANSWERS = ["Who keeps it?", "And when?"], ["Ines does.", "At night."]
# What looks like a special token in a template.
_SPECIAL = re.compile(r"<\|?[^\s<>{}'\"|]{1,25}\|?>|\[/?[A-Z_]{3,}\]")

if not FILES:
    pytest.skip("this version of TRL carries no chat templates", allow_module_level=True)

originals = pytest.mark.parametrize("name", FILES)


@cache
def _tokenizer(name: str) -> Any:
    template = FILES[name].read_text()
    special = ["<unk>", "<s>", "</s>", *(mark for mark in _SPECIAL.findall(template) if "think" not in mark)]
    special = list(dict.fromkeys(special))
    backend = byte_level(256 + len(special), special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def test_trl_carries_them() -> None:
    assert {"llama3", "qwen3", "gemma3", "gptoss", "deepseek_r1_distill", "phi3"} <= set(FILES)


@originals
def test_given_and_sampled_answers_are_what_the_original_gives(name: str) -> None:
    tokenizer = _tokenizer(name)
    codec = ChatCodec(None, tokenizer)
    prompt, answer = codec.encode_exchange(QUESTIONS[0], ANSWERS[0])
    messages = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": ANSWERS[0]}]
    whole = codec.render(messages)
    assert whole.startswith(tokenizer.decode(codec.preamble + prompt + answer))
    said = tokenizer.decode(codec.without_end(answer))
    assert said.strip() == ANSWERS[0]
    end, space = answer[len(codec.without_end(answer)) :], said[: len(said) - len(said.lstrip())]
    sampled = [tokenizer(space + text, add_special_tokens=False)["input_ids"] + end for text in ANSWERS]
    exchanges = codec.encode_dialogue(QUESTIONS, sampled)
    ids = codec.preamble + [token for exchange in exchanges for part in exchange for token in part]
    messages += [{"role": "user", "content": QUESTIONS[1]}, {"role": "assistant", "content": ANSWERS[1]}]
    whole = codec.render(messages)
    assert tokenizer.decode(ids) == whole[: whole.rindex(ANSWERS[1]) + len(ANSWERS[1])] + tokenizer.decode(end)
    assert codec.has_ended(exchanges[-1].answer_ids) or not end


@originals
def test_nobody_is_asked_within_a_thought(name: str) -> None:
    tokenizer = _tokenizer(name)
    codec = ChatCodec(None, tokenizer)
    for prompt in (
        codec.encode_prompt(QUESTIONS[:1]),
        codec.encode_request([{"role": "user", "content": QUESTIONS[0]}]),
    ):
        behind = tokenizer.decode(prompt).partition(QUESTIONS[0])[2]
        assert behind.count("<think>") == behind.count("</think>")
        assert "analysis" not in behind


@originals
def test_the_turns_stand_alone_behind_a_cartridge(name: str) -> None:
    tokenizer = _tokenizer(name)
    codec, behind = ChatCodec(None, tokenizer), ChatCodec(None, with_cartridge_chat_template(tokenizer))
    assert behind.encode_prompt(QUESTIONS[:1]) == codec.encode_prompt(QUESTIONS[:1])
    assert behind.preamble == [] or not codec.layout.opening
    text = codec.tokenizer.decode(codec.encode_context("The light is old."))
    assert text.count("The light is old.") == 1
