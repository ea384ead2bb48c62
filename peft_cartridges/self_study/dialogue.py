"""How conversations come about: one side asks from a seed prompt, the other answers, both with the chunk in context."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..chat import ChatCodec
from .backends.base import ContextSession, Generation
from .chunking import Chunk
from .conversation import Conversation, Turn
from .recitation import draw_recitation
from .seed_prompts import CHAIN_OF_THOUGHT, FOLLOW_UPS, draw_seed_prompt
from .sentences import first_words, split_sentences
from .synthesis_config import SynthesisConfig

SeedPrompts = Sequence[str] | Callable[[Chunk, random.Random], str]

# A quoted passage is at most this long, in words (or, in scripts without spaces, in characters).
_FOCUS_WORDS = 60


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


def recite(chunk: Chunk, codec: ChatCodec, rng: random.Random) -> Conversation:
    """A conversation whose answer is a passage of the chunk."""
    seed = rng.getrandbits(62)
    question, answer = draw_recitation(chunk.text, rng)
    return Conversation(chunk.id, "recitation", [Turn(question, *codec.encode_exchange(question, answer))], seed)


class Dialogue:
    """Holds planned conversations.

    Args:
        session: A back end with the chunk in context.
        codec: Renders and reads what is said.
        args: Lengths, temperatures and rounds.
        room: Tokens that fit behind the chunk; `None` where that is unknown.
    """

    def __init__(
        self,
        session: ContextSession,
        codec: ChatCodec,
        args: SynthesisConfig,
        room: int | None = None,
    ) -> None:
        self.session = session
        self.codec = codec
        self.args = args
        self.room = room

    def hold(self, chunk: Chunk, plans: Sequence[Plan]) -> list[Conversation]:
        """All rounds of the conversations, in the order of `plans`; one ends where a question is empty, or where an
        answer is (a thinking model's that did not come to the end of its thought): without any, it has no turns."""
        scripts = [_Script(plan) for plan in plans]
        going = scripts
        for number in range(self.args.num_rounds):
            asked = self._generate(
                [self._asking(script) for script in going],
                [_seed(script.plan, number, "question") for script in going],
                self.args.max_question_tokens,
                self.args.question_temperature,
            )
            for script, question in zip(going, asked, strict=True):
                script.questions.append(f"{self._text(question.token_ids)} {script.plan.reasoning}".strip())
                script.question_generations.append(question)
            going = [script for script in going if self._text(script.question_generations[-1].token_ids)]
            prompts = [self.codec.encode_prompt(script.questions, script.answers) for script in going]
            answers = self._generate(
                prompts,
                [_seed(script.plan, number, "answer") for script in going],
                self.args.max_answer_tokens,
                self.args.answer_temperature,
            )
            for script, prompt, answer in zip(going, prompts, answers, strict=True):
                script.answers.append(self.codec.take_answer(answer.token_ids))
                script.prompts.append(prompt)
                script.answer_generations.append(answer)
            going = [script for script in going if script.answers[-1]]
        return [
            Conversation(chunk.id, script.plan.seed_type, self._turns(script), script.plan.seed) for script in scripts
        ]

    def _asking(self, script: _Script) -> list[int]:
        """Token ids for the asking side, to whom the questions are its own and the answers the user's. They are not
        trained on, so it does not matter that they are encoded anew."""
        messages = [{"role": "user", "content": script.plan.prompt}]
        for number, (question, answer) in enumerate(zip(script.questions, script.answers, strict=True)):
            follow_up = random.Random(f"{script.plan.seed}/{number}").choice(FOLLOW_UPS)
            messages.append({"role": "assistant", "content": question})
            messages.append({"role": "user", "content": f"{self.codec.read(answer)}\n\n{follow_up}"})
        return self.codec.encode_request(messages)

    def _turns(self, script: _Script) -> list[Turn]:
        """As they are trained. What an engine said of an answer's tokens is kept where they stand behind the very tokens
        that they were sampled behind."""
        answers = [answer for answer in script.answers if answer]
        questions = script.questions[: len(answers)]
        turns: list[Turn] = []
        front: list[int] = []
        exchanges = self.codec.encode_dialogue(questions, answers) if answers else []
        for number, (prompt_ids, answer_ids) in enumerate(exchanges):
            asked, answered = script.question_generations[number], script.answer_generations[number]
            front += prompt_ids
            same = front == script.prompts[number] and answer_ids == answered.token_ids
            front += answer_ids
            turns.append(
                Turn(
                    questions[number],
                    prompt_ids,
                    answer_ids,
                    self._ended(asked),
                    self._ended(answered),
                    answered.top_k if same else None,
                    len(asked.token_ids) + len(answered.token_ids),
                )
            )
        return turns

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
        return generation.ended or self.codec.has_ended(generation.token_ids)

    def _text(self, ids: list[int]) -> str:
        """A question without quotation marks around it."""
        return self.codec.read(ids).strip().strip('"“”').strip()


@dataclass
class _Script:
    """A conversation that is being held: for each round the question, what its answer was sampled behind, the answer,
    and what was sampled for either."""

    plan: Plan
    questions: list[str] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    question_generations: list[Generation] = field(default_factory=list)
    answer_generations: list[Generation] = field(default_factory=list)


def _seed(plan: Plan, number: int, side: str) -> int:
    return random.Random(f"{plan.seed}/{number}/{side}").getrandbits(62)


def _shorten(passage: str) -> str:
    return first_words(" ".join(passage.split()), _FOCUS_WORDS)
