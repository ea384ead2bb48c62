"""`ChatCodec`: how texts and conversations become token ids, and what was sampled becomes text, for one model.

A document in context is a system message in front of the conversation, or the beginning of its first user message in
templates without a system role. Everything behind it (the *turns*) has the same ids whether a document, a cartridge or
nothing stands in front, so teacher and student are compared on the same ids. Where it is nothing, preamble and turns
are together what `apply_chat_template` gives.

What is trained is the conversation as the chat template gives it when it is over, with the answers' ids as they were
sampled. A model may have to be asked with a longer prompt than that (one that closes the thought which the template
opens for it); `encode_prompt` is what answers are sampled behind, and `encode_dialogue` what is trained.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from .layout import ChatLayout, Message, find_layout, get_tokenizer, has_chat_template
from .thoughts import SWITCHES, close_thought, find_answer, opened_thought

# What happens to a thinking model's thoughts.
THOUGHTS = ("skip", "drop", "learn")

# Beginnings of a message that tokenizers join with a space in front of them, or do not.
_BEGINNINGS = ("What", "7", "(", "“", "é", "海")
# Stands in front of a text that is encoded as the middle of another, where tokenizers treat a beginning otherwise.
_ANCHOR = "a"


class Exchange(NamedTuple):
    """A question and its answer, as they are trained.

    Args:
        prompt_ids: Token ids from the end of the answer before (in the first exchange, of the context or preamble) up
            to where the answer begins.
        answer_ids: Token ids of the answer, with the end-of-turn token if it has one that is learned.
    """

    prompt_ids: list[int]
    answer_ids: list[int]


class ChatCodec:
    """Renders, cuts and reads conversations with one model's chat template.

    Args:
        model: The causal LM (or a PEFT model), whose configurations name its end tokens; `None` where only the
            tokenizer is at hand.
        processing_class: Its tokenizer or processor.
        chat_template_kwargs: Further arguments of the chat template (tools, documents, a thinking mode), as a mapping
            or as JSON.
        thoughts: What becomes of a thinking model's thoughts. `skip`: it answers at once. Templates are told so
            (`enable_thinking=False`), and a thought that the generation prompt opens nevertheless is closed while an
            answer is sampled. `drop`: it thinks, and what is trained is the answer without the thought. `learn`: the
            thought is a part of the answer. `chat_template_kwargs` that turn thinking on make `skip` a `drop`.

    Raises:
        ValueError: `chat_template_kwargs` is no mapping and no JSON object, or `thoughts` is unknown.
    """

    def __init__(
        self,
        model: Any,
        processing_class: Any,
        chat_template_kwargs: Mapping[str, Any] | str | None = None,
        *,
        thoughts: str = "skip",
    ) -> None:
        if thoughts not in THOUGHTS:
            raise ValueError(f"`thoughts` is {thoughts!r}; there are: {', '.join(THOUGHTS)}.")
        given = parse_template_kwargs(chat_template_kwargs)
        if thoughts == "skip" and any(given.get(name) for name in SWITCHES):
            thoughts = "drop"
        self.tokenizer = get_tokenizer(processing_class)
        self.thoughts = thoughts
        # Tokenizers of some families refuse arguments that they do not know.
        template = self.tokenizer.get_chat_template() if self.has_template else ""
        known = [name for name in SWITCHES if re.search(rf"\b{name}\b", template)]
        self.template_kwargs: dict[str, Any] = {**dict.fromkeys(known, thoughts != "skip"), **given}
        self._configured_ends = _configured_ends(model)

    @classmethod
    def of(cls, model: Any, processing_class: Any) -> ChatCodec:
        """`processing_class`, if it is a codec already, else one with the defaults."""
        return processing_class if isinstance(processing_class, cls) else cls(model, processing_class)

    @property
    def has_template(self) -> bool:
        return has_chat_template(self.tokenizer)

    # -- what the template is like -----------------------------------------------------------------------------------

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """All token ids that end an answer: those of the model's configurations, the tokenizer's, and the one that the
        chat template puts behind an answer."""
        ends = {*self._configured_ends, self.tokenizer.eos_token_id}
        if self.has_template:
            special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
            closing = self._encode_behind(self._turn_texts(["?"])[-1].lstrip())
            ends.update(token for token in closing[:1] if token in special)
        return frozenset(token for token in ends if token is not None)

    @cached_property
    def opens_thought(self) -> bool:
        """Whether an answer that is sampled behind `encode_prompt` begins within a thought."""
        return opened_thought(self._render_request([_user("?")])) is not None

    @cached_property
    def preamble(self) -> list[int]:
        """Token ids that the chat template puts in front of the turns when no system message is given (a start token, a
        default system prompt, the opening of the first user message where a context would be a part of it, or
        nothing): with a cartridge loaded, users send this in front of their turns.

        Only what is the same whatever follows: the space of "[INST] What" is often a part of the token behind it, and
        so belongs to the turns.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        layout = self.layout
        if not layout.preamble:
            return []
        encoded = [self._encode(layout.head + beginning) for beginning in _BEGINNINGS]
        columns = zip(self._encode(layout.preamble), *encoded, strict=False)
        return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]

    @cached_property
    def layout(self) -> ChatLayout:
        """Where a context stands, and where the turns begin.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        return find_layout(self.render)

    # -- texts -------------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """A conversation as the chat template writes it; `options` are `apply_chat_template`'s.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not self.has_template:
            raise ValueError(
                "`processing_class` has no chat template: pass an instruct model's tokenizer, or set "
                "`tokenizer.chat_template`."
            )
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **{**self.template_kwargs, **options})

    def encode_context(self, text: str, *, chat_template: bool = True) -> list[int]:
        """Token ids of `text` as the context in front of a conversation: a system message (or, in templates without
        one, the beginning of the first user message, up to where the question begins); the plain text with the
        tokenizer's own special tokens where `chat_template` is false or the tokenizer has none.

        Raises:
            ValueError: `text` is empty.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError("`text` is empty: pass the text of the corpus.")
        if not (chat_template and self.has_template):
            return self.tokenizer(text)["input_ids"]
        return self._encode(self.layout.render_context(self.render, text.strip()))

    def render_turns(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text that `encode_turns` gives the ids of (up to a space in front).

        Raises:
            ValueError: the tokenizer has no chat template, or the conversation begins with no user message.
        """
        return self._behind_preamble(self.render(messages, add_generation_prompt=add_generation_prompt))

    def encode_turns(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> list[int]:
        """Token ids of the turns of a conversation, which begins with a user message, as the chat template writes them,
        behind a context made by `encode_context`, or behind `preamble` where there is none.

        Raises:
            ValueError: as `render_turns`.
        """
        return self._encode_turns(self.render_turns(messages, add_generation_prompt=add_generation_prompt))

    def encode_request(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation behind which the next answer is to be sampled: as `encode_turns` with the
        generation prompt, but thoughts are treated as the codec was told.

        Raises:
            ValueError: as `render_turns`.
        """
        return self._encode_turns(self._behind_preamble(self._render_request(messages)))

    # -- conversations that are sampled and trained ------------------------------------------------------------------

    def encode_prompt(self, questions: Sequence[str], answers: Sequence[Sequence[int]] = ()) -> list[int]:
        """All token ids behind the context that the answer to the last question is to be sampled behind.

        Args:
            questions: The user's messages.
            answers: Token ids of the answers to all but the last, as `take_answer` gave them.

        Raises:
            ValueError: as `encode_dialogue`.
        """
        texts = self._split(self._render_request(self._with_marks(questions)[:-1]), questions, len(questions) - 1)
        return [token for exchange in self._fill([*texts, ""], [*answers, ()]) for part in exchange for token in part]

    def encode_dialogue(self, questions: Sequence[str], answers: Sequence[Sequence[int]]) -> list[Exchange]:
        """A conversation as it is trained: what the chat template gives for the whole of it, with the answers' ids as
        they were sampled.

        An end token that the model sampled stays, and is learned, where the template has that very token; in place of
        another one, and behind an answer that was cut, the template's stands in the prompt that follows.

        Args:
            questions: The user's messages.
            answers: Token ids of their answers, as `take_answer` gave them.

        Raises:
            ValueError: the chat template cannot render the conversation exactly: it changes a question or the order of
                the messages, or it leaves out the thoughts of earlier answers, which are to be learned.
        """
        texts = self._turn_texts(questions)
        if self.thoughts == "learn":
            if any(self._find_answer(answer) != 0 for answer in answers[:-1]):
                raise ValueError(
                    "Chat templates leave out the thoughts of earlier answers, so a conversation of several rounds "
                    'cannot have them: set `num_rounds=1`, or `thoughts="drop"`.'
                )
            asked = self._render_request(self._with_marks(questions)[:-1])
            texts = [*self._split(asked, questions, len(questions) - 1), texts[-1]]
        return self._fill(texts, answers)

    def encode_exchange(self, question: str, answer: str) -> Exchange:
        """A question and an answer that is given as text, up to the end-of-turn token: what the chat template gives
        for them.

        Raises:
            ValueError: the chat template changes the question or the answer.
        """
        prompt, closing = self._turn_texts([question])
        text = self.render_turns([_user(question), _assistant(answer)])
        if not (text.startswith(prompt) and text.endswith(closing)) or (
            text[len(prompt) : len(text) - len(closing)].strip() != answer.strip()
        ):
            raise ValueError(f"The chat template changes the answer {_shorten(answer)}: it renders {_shorten(text)}.")
        ids, prompt_ids, closing_ids = (
            self._encode_turns(text),
            self._encode_turns(prompt),
            self._encode_behind(closing),
        )
        # A token may hold the last of the prompt and the first of the answer: it belongs to the answer.
        start, end = _length_in_common(ids, prompt_ids), len(ids)
        if (place := self._find_end(closing_ids)) is not None and ids[-len(closing_ids) :] == closing_ids:
            end -= len(closing_ids) - place - 1
        elif ids[-len(closing_ids) :] == closing_ids:
            end -= len(closing_ids)
        return Exchange(ids[:start], ids[start:end])

    # -- what was sampled --------------------------------------------------------------------------------------------

    def take_answer(self, ids: Sequence[int]) -> list[int]:
        """What is trained of what was sampled behind `encode_prompt`: the answer, its end token included, without its
        thought (with it, if thoughts are learned); nothing, if the thought did not come to its end."""
        start = self._find_answer(ids)
        if start is None:
            return []
        return list(ids) if self.thoughts == "learn" else list(ids[start:])

    def read(self, ids: Sequence[int]) -> str:
        """The text of what was sampled, without its thought and special tokens; empty, if there is only a thought."""
        start = self._find_answer(ids)
        return "" if start is None else self.decode(ids[start:])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids without special tokens, thoughts included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def has_ended(self, ids: Sequence[int]) -> bool:
        """Whether an answer ends with one of the model's end tokens."""
        return bool(ids) and ids[-1] in self.end_ids

    def without_end(self, ids: Sequence[int]) -> list[int]:
        """An answer without the end token behind it."""
        return list(ids[:-1]) if self.has_ended(ids) else list(ids)

    # ----------------------------------------------------------------------------------------------------------------

    @cached_property
    def _openings(self) -> tuple[str, str, str]:
        """Of one question: what is rendered with the generation prompt; what stands in front of its answer once that is
        there; and the space between the two, which models sample as a part of the answer."""
        asked = self.render([_user("?")], add_generation_prompt=True)
        (mark,) = _make_marks(["?"])
        answered = self.render([_user("?"), _assistant(mark)]).partition(mark)[0]
        space = answered[len(asked) :] if answered.startswith(asked) else ""
        space = space if space.isspace() else ""
        return asked, answered.removesuffix(space), space

    def _render_request(self, messages: Sequence[Message]) -> str:
        text = self.render(messages, add_generation_prompt=True)
        if self.thoughts != "skip":
            return text
        asked, answered, _ = self._openings
        if asked.startswith(answered):
            return close_thought(text)
        # Behind an answer's own opening (its channel, an empty thought) the model can only answer.
        common = _length_in_common(asked, answered)
        return text.removesuffix(asked[common:]) + answered[common:]

    def _with_marks(self, questions: Sequence[str]) -> list[Message]:
        pairs = zip(questions, _make_marks(questions), strict=True)
        return [message for question, mark in pairs for message in (_user(question), _assistant(mark))]

    def _turn_texts(self, questions: Sequence[str]) -> list[str]:
        """What the chat template writes in front of each answer, and behind the last, in the whole conversation."""
        texts = self._split(self.render(self._with_marks(questions)), questions, len(questions))
        return [*(text.removesuffix(self._openings[2]) for text in texts[:-1]), texts[-1]]

    def _split(self, rendered: str, questions: Sequence[str], number: int) -> list[str]:
        """The turns between their first `number` marks."""
        rest, texts = self._behind_preamble(rendered), []
        for mark in _make_marks(questions)[:number]:
            text, found, rest = rest.partition(mark)
            texts.append(text if found else "")
        texts.append(rest)
        for question, text in zip(questions, texts, strict=False):
            if question.strip() not in text:
                raise ValueError(
                    f"The chat template cannot render a conversation of {len(questions)} rounds exactly: it changes the "
                    f"question {_shorten(question)}, or leaves out an answer."
                )
        return texts

    def _fill(self, texts: Sequence[str], answers: Sequence[Sequence[int]]) -> list[Exchange]:
        """The exchanges, from the texts in front of the answers and behind the last, and the answers' ids."""
        prompt, exchanges = self._encode_turns(texts[0]), []
        for answer, behind in zip(answers, texts[1:], strict=True):
            ids, following = list(answer), self._encode_behind(behind)
            place = self._find_end(following)
            if self.has_ended(ids) and place is not None and following[place] == ids[-1]:
                space, (body, end) = following[:place], (ids[:-1], ids[-1:])
                ids = [*body, *([] if body[len(body) - place :] == space else space), *end]
                following = following[place + 1 :]
            elif self.has_ended(ids) and following:
                ids = ids[:-1]
            exchanges.append(Exchange(prompt, ids))
            prompt = following
        return exchanges

    def _find_end(self, ids: Sequence[int]) -> int | None:
        """Where what stands behind an answer has its end token: at its beginning, up to spaces."""
        place = next((i for i, token in enumerate(ids) if not self._decode_all([token]).isspace()), None)
        return place if place is not None and ids[place] in self.end_ids else None

    def _find_answer(self, ids: Sequence[int]) -> int | None:
        return find_answer(ids, self._decode_all, opened=self.opens_thought)

    def _behind_preamble(self, rendered: str) -> str:
        layout = self.layout
        if not rendered.startswith(layout.head):
            raise ValueError(
                f"`messages` must begin with a user message, which the chat template opens with {layout.head!r}; they "
                f"render as {rendered[: len(layout.head) + 40]!r}."
            )
        return rendered[len(layout.preamble) :]

    def _encode_turns(self, text: str) -> list[int]:
        ids, preamble = self._encode(self.layout.preamble + text), self.preamble
        return ids[len(preamble) :] if ids[: len(preamble)] == preamble else self._encode(text)

    def _encode_behind(self, text: str) -> list[int]:
        """A text as it is encoded in the middle of another."""
        front, ids = self._encode(_ANCHOR), self._encode(_ANCHOR + text)
        return ids[len(front) :] if ids[: len(front)] == front else self._encode(text)

    def _encode(self, rendered: str) -> list[int]:
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def _decode_all(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def parse_template_kwargs(arguments: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Arguments of a chat template, given as a mapping or as JSON.

    Raises:
        ValueError: the text is not a JSON object.
    """
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(f"`chat_template_kwargs` is not JSON ({error}): {arguments!r}.") from None
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"`chat_template_kwargs` must be a mapping (a JSON object), got {arguments!r}.")
    return dict(arguments or {})


def _configured_ends(model: Any) -> set[int]:
    """The end tokens that the model's generation configuration and configuration name."""
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else None
    ends: set[int] = set()
    for holder in (getattr(model, "generation_config", None), config, text_config):
        found = getattr(holder, "eos_token_id", None)
        ends.update(token for token in (found if isinstance(found, (list, tuple)) else [found]) if token is not None)
    return ends


def _length_in_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _make_marks(questions: Sequence[str]) -> list[str]:
    """Words that stand for the answers while a conversation is rendered, and are in no question."""
    brackets = 1
    while any("[" * brackets + "answer" in question for question in questions):
        brackets += 1
    return ["[" * brackets + f"answer {number}" + "]" * brackets for number in range(len(questions))]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
