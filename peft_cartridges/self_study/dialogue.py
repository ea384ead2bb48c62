"""How conversations come about: one side asks from a seed prompt, the other answers, both with the chunk in context."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..chat import encode_turns, get_tokenizer
from .backends.base import ContextSession, Generation
from .chunking import Chunk
from .conversation import Conversation, Turn, encode_answer, encode_next_question, encode_question
from .recitation import draw_recitation, split_sentences
from .seed_prompts import CHAIN_OF_THOUGHT, FOLLOW_UPS, draw_seed_prompt
from .synthesis_config import SynthesisConfig

SeedPrompts = Sequence[str] | Callable[[Chunk, random.Random], str]

_THOUGHTS = re.compile(r"^.*?</think(?:ing)?>", re.DOTALL)
# A quoted passage is at most this long, in words (or, in scripts without spaces, in characters).
_FOCUS_WORDS, _FOCUS_CHARACTERS = 60, 400


@dataclass(frozen=True)
class Plan:
    """How a conversation begins.

    Args:
        seed_type: Kind of its seed prompt.
        prompt: What the asking side is told.
        reasoning: What each question ends with, if its answer is to be reasoned out.
        seed: Of its random draws.
    """

    seed_type: str
    prompt: str
    reasoning: str
    seed: int


def plan_dialogues(
    chunk: Chunk, number: int, rng: random.Random, args: SynthesisConfig, seed_prompts: SeedPrompts | None = None
) -> list[Plan]:
    """So many conversations about a chunk, its seed types alike often.

    Raises:
        ValueError: a callable `seed_prompts` gives no text.
    """
    types = itertools.cycle(rng.sample(args.seed_types, len(args.seed_types)))
    sentences = split_sentences(chunk.text)
    plans = []
    for seed_type in itertools.islice(types, number):
        if seed_prompts is None:
            passage = _shorten(rng.choice(sentences)) if rng.random() < args.focus_share else None
            prompt = draw_seed_prompt(seed_type, rng, passage=passage)
        elif callable(seed_prompts):
            seed_type, prompt = "custom", seed_prompts(chunk, rng)
        else:
            seed_type, prompt = "custom", rng.choice(seed_prompts)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"`seed_prompts` gave {prompt!r} for the chunk {chunk.id}, not a text.")
        reasoning = rng.choice(CHAIN_OF_THOUGHT) if rng.random() < args.chain_of_thought_share else ""
        plans.append(Plan(seed_type, prompt, reasoning, rng.getrandbits(62)))
    return plans


def recite(chunk: Chunk, processing_class: Any, rng: random.Random) -> Conversation:
    """A conversation whose answer is a passage of the chunk."""
    seed = rng.getrandbits(62)
    question, answer = draw_recitation(chunk.text, rng)
    prompt_ids = encode_question(processing_class, question)
    turn = Turn(question, prompt_ids, encode_answer(processing_class, question, answer))
    return Conversation(chunk.id, "recitation", [turn], seed)


class Dialogue:
    """Holds planned conversations.

    Args:
        session: A back end with the chunk in context.
        processing_class: Tokenizer or processor.
        args: Lengths, temperatures and rounds.
        end_ids: Token ids that end a turn.
        room: Tokens that fit behind the chunk; `None` where that is unknown.
    """

    def __init__(
        self,
        session: ContextSession,
        processing_class: Any,
        args: SynthesisConfig,
        end_ids: set[int],
        room: int | None = None,
    ) -> None:
        self.session = session
        self.processing_class = processing_class
        self.args = args
        self.end_ids = end_ids
        self.room = room

    def hold(self, chunk: Chunk, plans: Sequence[Plan]) -> list[Conversation]:
        """All rounds of the conversations, in the order of `plans`; one whose first question is empty has no turns, one
        whose later question is empty ends there."""
        conversations = [Conversation(chunk.id, plan.seed_type, [], plan.seed) for plan in plans]
        going = list(range(len(plans)))
        for number in range(self.args.num_rounds):
            asked = self._generate(
                [self._asking(plans[i], conversations[i]) for i in going],
                [_seed(plans[i], number, "question") for i in going],
                self.args.max_question_tokens,
                self.args.question_temperature,
            )
            questions = dict(zip(going, asked, strict=True))
            going = [i for i in going if self._text(questions[i].token_ids)]
            turns: list[Turn] = []
            for i in going:
                question = f"{self._text(questions[i].token_ids)} {plans[i].reasoning}".strip()
                prompt_ids = self._answering(conversations[i], question)
                turns.append(
                    Turn(question, prompt_ids, [], self._ended(questions[i]), generated=len(questions[i].token_ids))
                )
            answers = self._generate(
                [conversations[i].turn_ids + turn.prompt_ids for i, turn in zip(going, turns, strict=True)],
                [_seed(plans[i], number, "answer") for i in going],
                self.args.max_answer_tokens,
                self.args.answer_temperature,
            )
            for i, turn, answer in zip(going, turns, answers, strict=True):
                changes: dict[str, Any] = {"answer_ids": answer.token_ids, "top_k": answer.top_k}
                changes["answer_ended"] = self._ended(answer)
                changes["generated"] = turn.generated + len(answer.token_ids)
                conversations[i].turns.append(replace(turn, **changes))
        return conversations

    def _asking(self, plan: Plan, conversation: Conversation) -> list[int]:
        """Token ids for the asking side, to whom the questions are its own and the answers the user's. They are not
        trained on, so it does not matter that they are encoded anew."""
        messages = [{"role": "user", "content": plan.prompt}]
        for number, turn in enumerate(conversation.turns):
            answer = self._decode(turn.answer_ids)
            follow_up = random.Random(f"{plan.seed}/{number}").choice(FOLLOW_UPS)
            messages.append({"role": "assistant", "content": turn.question})
            messages.append({"role": "user", "content": f"{answer}\n\n{follow_up}"})
        return encode_turns(self.processing_class, messages, add_generation_prompt=True)

    def _answering(self, conversation: Conversation, question: str) -> list[int]:
        if not conversation.turns:
            return encode_question(self.processing_class, question)
        return encode_next_question(self.processing_class, conversation.turns[-1].answer_ids, question)

    def _generate(
        self, prompts: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Generation]:
        if not prompts:
            return []
        longest = max(map(len, prompts))
        if self.room is not None and longest + max_new_tokens > self.room:
            raise ValueError(
                f"A turn of {longest} + {max_new_tokens} tokens does not fit behind its chunk: the model's window has "
                f"{self.room} tokens left. Lower `max_chunk_tokens`, `max_question_tokens`, `max_answer_tokens` or "
                "`num_rounds`."
            )
        return self.session.generate(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)

    def _ended(self, generation: Generation) -> bool:
        return generation.ended or (bool(generation.token_ids) and generation.token_ids[-1] in self.end_ids)

    def _decode(self, ids: list[int]) -> str:
        return get_tokenizer(self.processing_class).decode(ids, skip_special_tokens=True)

    def _text(self, ids: list[int]) -> str:
        """A question without thoughts and quotation marks around it."""
        return _THOUGHTS.sub("", self._decode(ids), count=1).strip().strip('"“”').strip()


def _seed(plan: Plan, number: int, side: str) -> int:
    return random.Random(f"{plan.seed}/{number}/{side}").getrandbits(62)


def _shorten(passage: str) -> str:
    return " ".join(passage.split()[:_FOCUS_WORDS])[:_FOCUS_CHARACTERS]
