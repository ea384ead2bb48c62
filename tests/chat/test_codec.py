"""What is trained is what the chat template gives for the whole conversation, with templates like those of the field's
models; and what thinking models are asked and answer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_cartridges.chat import ChatCodec, with_cartridge_chat_template
from tests.chat.families import FAMILIES, THINKING, Family

families = pytest.mark.parametrize("name", FAMILIES)
thinkers = pytest.mark.parametrize("name", THINKING)
drawn = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
contents = st.lists(
    st.sampled_from(["What", "the", "captain", "1234", "?", "(a", "“aye”", "é", "海", "_x", "a\n\nb", "[answer", "<-"]),
    min_size=1,
    max_size=5,
).map(" ".join)
rounds = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)


@functools.cache
def _tokenizer(name: str, merges: bool) -> Any:
    return FAMILIES[name].tokenizer(merges=merges)


def _codec(name: str, *, merges: bool = True, **options: Any) -> ChatCodec:
    tokenizer = _tokenizer(name, merges)
    return ChatCodec(FAMILIES[name].model(tokenizer), tokenizer, **options)


def _ids(codec: ChatCodec, text: str) -> list[int]:
    return codec.tokenizer(text, add_special_tokens=False)["input_ids"]


def _text(codec: ChatCodec, ids: list[int]) -> str:
    return codec.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _whole(codec: ChatCodec, turns: list[tuple[str, str]]) -> str:
    """What the tokenizer itself makes of it, in the codec's mode of thinking."""
    return codec.tokenizer.apply_chat_template(_messages(turns), tokenize=False, **codec.template_kwargs)


def _behind_answer(name: str) -> str:
    """What the template has behind the last answer, up to its end token."""
    return "" if name == "GLM" else FAMILIES[name].sampled_end


def _joined(exchanges: Any) -> list[int]:
    return [token for exchange in exchanges for part in exchange for token in part]


@families
@pytest.mark.parametrize("merges", [False, True])
@drawn
@given(question=contents, answer=contents)
def test_a_given_answer_is_trained_as_the_template_gives_it(
    name: str, merges: bool, question: str, answer: str
) -> None:
    codec = _codec(name, merges=merges)
    prompt, answer_ids = codec.encode_exchange(question, answer)
    whole = _whole(codec, [(question, answer)])
    up_to_end = whole[: whole.rindex(answer) + len(answer)] + _behind_answer(name)
    assert whole.startswith(up_to_end)
    assert codec.preamble + prompt + answer_ids == _ids(codec, up_to_end)
    # All of the answer, its end, and nothing else (a space in front may be a part of its first token).
    assert _text(codec, answer_ids).lstrip() == answer + _behind_answer(name)
    assert _text(codec, codec.without_end(answer_ids)).lstrip() == answer


@families
@pytest.mark.parametrize("merges", [False, True])
@drawn
@given(turns=rounds, end=st.sampled_from(["its own", "none", "another"]))
def test_sampled_answers_stand_in_the_whole_conversation(
    name: str, merges: bool, turns: list[tuple[str, str]], end: str
) -> None:
    family, codec = FAMILIES[name], _codec(name, merges=merges)
    space = " " if name == "Mistral 7B" else ""  # which the model says itself
    bodies = [_ids(codec, space + answer) for _, answer in turns]
    ending = {"its own": family.sampled_end, "none": "", "another": family.eos}[end]
    if name == "GLM" and end == "another":
        return  # that template has no end of its own to put in its place
    sampled = [body + _ids(codec, ending) for body in bodies]
    exchanges = codec.encode_dialogue([question for question, _ in turns], sampled)
    ids, whole = codec.preamble + _joined(exchanges), _whole(codec, turns)
    ended = ending and exchanges[-1].answer_ids[-1:] == _ids(codec, ending)
    up_to_end = whole[: whole.rindex(turns[-1][1]) + len(turns[-1][1])] + (ending if ended else "")
    assert _text(codec, ids) == up_to_end
    assert not ended or name == "GLM" or whole.startswith(up_to_end)
    if not merges:
        assert ids == _ids(codec, up_to_end)
    for body, given_ids, exchange in zip(bodies, sampled, exchanges, strict=True):
        assert exchange.answer_ids in (body, given_ids)
    if end == "its own" and name != "GPT-OSS":  # which ends an answer otherwise once it is history
        assert [exchange.answer_ids for exchange in exchanges] == sampled


@families
@drawn
@given(turns=rounds)
def test_what_is_sampled_behind_holds_the_conversation_so_far(name: str, turns: list[tuple[str, str]]) -> None:
    family, codec = FAMILIES[name], _codec(name)
    questions = [question for question, _ in turns]
    space = " " if name == "Mistral 7B" else ""  # which the model says itself
    answers = [_ids(codec, space + answer + family.sampled_end) for _, answer in turns[:-1]]
    prompt = codec.encode_prompt(questions, answers)
    text = _text(codec, prompt)
    assert text.endswith(family.prompt)
    if family.thinking is None:  # it is then what is trained, and what users send
        assert prompt == _joined(codec.encode_dialogue(questions, [*answers, ()]))
        messages = [*_messages(turns[:-1]), {"role": "user", "content": questions[-1]}]
        expected = codec.render_turns(messages, add_generation_prompt=True)
        assert text.lstrip() == expected.lstrip()  # a token may begin with the space that ends the preamble


@families
def test_every_end_token_of_the_model_is_known(name: str) -> None:
    family, codec = FAMILIES[name], _codec(name)
    wanted = {*family.ends, family.eos, family.sampled_end}
    assert set(codec.tokenizer.convert_ids_to_tokens(sorted(codec.end_ids))) == wanted
    # Without the model, what the template puts behind an answer is known beside the tokenizer's.
    alone = ChatCodec(None, codec.tokenizer)
    expected = {family.eos} if name == "GLM" else {family.eos, family.sampled_end}
    assert set(codec.tokenizer.convert_ids_to_tokens(sorted(alone.end_ids))) == expected


@families
@drawn
@given(text=contents, turns=rounds)
def test_a_context_stands_in_front_of_the_same_turns(name: str, text: str, turns: list[tuple[str, str]]) -> None:
    family, codec = FAMILIES[name], _codec(name, merges=False)
    messages = _messages(turns)
    if family.system:
        about = [{"role": "system", "content": text}, *messages]
    else:
        about = [{"role": "user", "content": f"{text}\n\n{turns[0][0]}"}, *messages[1:]]
    rendered = codec.tokenizer.apply_chat_template(about, tokenize=False, **codec.template_kwargs)
    assert _text(codec, codec.encode_context(text) + codec.encode_turns(messages)) == rendered


@families
def test_behind_a_cartridge_there_are_the_turns_alone(name: str) -> None:
    for thoughts in ("skip", "drop"):
        codec = _codec(name, thoughts=thoughts)
        behind = ChatCodec(None, with_cartridge_chat_template(codec.tokenizer), thoughts=thoughts)
        messages = _messages([("Who?", "Me."), ("When?", "Now.")])
        assert behind.encode_turns(messages) == codec.encode_turns(messages)
        assert behind.encode_prompt(["Who?"]) == codec.encode_prompt(["Who?"])
        merged = not codec.layout.opening  # the context is then a part of the first message, whose opening stays
        assert merged or behind.preamble == []


# -- thoughts --------------------------------------------------------------------------------------------------------


def _thinking_aloud(codec: ChatCodec, family: Family, answer: str) -> list[int]:
    opening, closing = family.thought
    opened = (family.thinking or "").endswith(opening)
    return _ids(codec, ("" if opened else opening) + "Hm, the captain" + closing + answer + family.sampled_end)


@thinkers
def test_a_thinking_model_answers_at_once_by_default(name: str) -> None:
    family, codec = FAMILIES[name], _codec(name)
    assert _text(codec, codec.encode_prompt(["Who?"])).endswith("Who?" + _between(family) + family.prompt)
    assert _text(codec, codec.encode_dialogue(["Who?"], [()])[0].prompt_ids).endswith(family.trained)
    messages = [{"role": "user", "content": "Ask something."}]
    assert _text(codec, codec.encode_request(messages)).endswith(family.prompt)
    assert not codec.opens_thought


def _between(family: Family) -> str:
    ends = {"<|turn>": "<turn|>\n", "<|Assi": "", "<|start": "<|end|>", "<|im_st": "<|im_end|>\n"}
    return next(end for opening, end in ends.items() if family.prompt.startswith(opening))


@thinkers
@pytest.mark.parametrize("thoughts", ["skip", "drop"])
def test_thoughts_are_no_question_and_are_not_trained(name: str, thoughts: str) -> None:
    family, codec = FAMILIES[name], _codec(name, thoughts=thoughts)
    answer = _ids(codec, "Ines keeps it." + family.sampled_end)
    if thoughts == "drop":
        assert _text(codec, codec.encode_prompt(["Who?"])).endswith(family.thinking)
        thought = _thinking_aloud(codec, family, "Ines keeps it.")
    else:  # it thinks all the same
        thought = _ids(codec, family.thought[0]) + _ids(codec, "Hm" + family.thought[1]) + answer
    assert codec.read(thought) == "Ines keeps it." and codec.take_answer(thought) == answer
    assert codec.take_answer(answer) == (answer if not codec.opens_thought else [])
    # One that was cut has neither question nor answer.
    cut = thought[: thought.index(_ids(codec, family.thought[1].strip())[0])]
    assert codec.read(cut) == "" and codec.take_answer(cut) == []
    (exchange,) = codec.encode_dialogue(["Who?"], [codec.take_answer(thought)])
    assert _text(codec, codec.preamble + _joined([exchange])) in _whole(codec, [("Who?", "Ines keeps it.")])
    assert thoughts == "drop" or _text(codec, exchange.prompt_ids).endswith(family.trained)


@thinkers
def test_thoughts_are_learned_only_if_asked_for(name: str) -> None:
    family, codec = FAMILIES[name], _codec(name, thoughts="learn")
    sampled = _thinking_aloud(codec, family, "Ines keeps it.")
    assert codec.take_answer(sampled) == sampled and codec.read(sampled) == "Ines keeps it."
    (exchange,) = codec.encode_dialogue(["Who?"], [sampled])
    # As the model is asked, and as it answered.
    assert exchange == (codec.encode_prompt(["Who?"]), sampled)
    assert _text(codec, exchange.prompt_ids).endswith(family.thinking)
    if name.startswith("Qwen 3"):  # whose templates keep the thought of the last answer
        said = _text(codec, sampled[:-1])
        said = said if said.startswith("<think>") else "<think>\n" + said
        assert _whole(codec, [("Who?", said)]).startswith(_text(codec, codec.preamble + _joined([exchange])))
    with pytest.raises(ValueError, match='set `num_rounds=1`, or `thoughts="drop"`'):
        codec.encode_dialogue(["Who?", "When?"], [sampled, sampled])


def test_chat_template_kwargs_that_turn_thinking_on_are_heard() -> None:
    codec = _codec("Qwen 3.5", chat_template_kwargs='{"enable_thinking": true}')
    assert codec.thoughts == "drop" and codec.opens_thought
    assert codec.read(_ids(codec, "Hm.</think>\n\nWho?<|im_end|>")) == "Who?"
    with pytest.raises(ValueError, match="`thoughts` is 'hide'; there are: skip, drop, learn"):
        _codec("Qwen 3", thoughts="hide")


# -- what cannot be rendered exactly ----------------------------------------------------------------------------------


def test_what_a_template_changes_is_refused() -> None:
    codec = _codec("QwQ")
    with pytest.raises(ValueError, match="The chat template changes the answer 'a </think> b'"):
        codec.encode_exchange("Who?", "a </think> b")
    tokenizer = FAMILIES["SmolLM2"].tokenizer(merges=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'].replace('W', 'w')")
    with pytest.raises(ValueError, match=r"cannot render .* 2 rounds exactly: it changes the question 'When"):
        ChatCodec(None, tokenizer).encode_dialogue(["who?", "When?"], [[30], [31]])
    tokenizer.chat_template = (
        "{% for m in messages[-2:] %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # forgets what was said before
    with pytest.raises(ValueError, match="leaves out or changes the user's message 'The first question'"):
        ChatCodec(None, tokenizer).encode_prompt(["Who?"])
