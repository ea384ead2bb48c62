"""How a conversation comes about: one side asks from a seed prompt, the other answers, both with the chunk in context.

A dialogue says what is to be sampled next and is told what was; who samples it, and when, is none of its business.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..chat import ChatCodec
from ..corpus import Chunk, split_sentences
from ..corpus.sentences import first_words
from .conversation import Conversation, Plan, Turn
from .engines import Generation, Request
from .prompts import CHAIN_OF_THOUGHT, draw_recitation, draw_seed_prompt
from .synthesis_config import SynthesisConfig

SeedPrompts = Sequence[str] | Callable[[Chunk, random.Random], str]

# A quoted passage is at most this long, in words (or, in scripts without spaces, in characters).
FOCUS_WORDS = 60


def plan_dialogue(
    chunk: Chunk, seed_type: str, rng: random.Random, args: SynthesisConfig, seed_prompts: SeedPrompts | None = None
) -> Plan:
    """How a conversation about a chunk begins.

    Raises:
        ValueError: a callable `seed_prompts` gives no text.
    """
    if seed_prompts is None:
        passage = None
        if rng.random() < args.focus_share:
            passage = first_words(" ".join(rng.choice(split_sentences(chunk.text)).split()), FOCUS_WORDS)
        prompt = draw_seed_prompt(seed_type, rng, passage=passage)
    elif callable(seed_prompts):
        seed_type, prompt = "custom", seed_prompts(chunk, rng)
    else:
        seed_type, prompt = "custom", rng.choice(seed_prompts)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"`seed_prompts` gave {prompt!r} for the chunk {chunk.id}, not a text.")
    reasoning = rng.choice(CHAIN_OF_THOUGHT) if rng.random() < args.chain_of_thought_share else ""
    return Plan(seed_type, prompt, reasoning, rng.getrandbits(62))


def recite(chunk: Chunk, codec: ChatCodec, rng: random.Random) -> Conversation:
    """A conversation whose answer is a passage of the chunk.

    Raises:
        ValueError: the chat template changes the question or the answer.
    """
    question, answer = draw_recitation(chunk.text, rng)
    return Conversation(chunk.id, "recitation", [Turn(question, *codec.encode_exchange(question, answer))])


class Dialogue:
    """Holds a planned conversation.

    Args:
        plan: How it begins.
        context: Token ids of the chunk in context.
        codec: Renders and reads what is said.
        args: Lengths, temperatures and rounds.
        window: Tokens that context and turns may have together; `None` where that is unknown.
    """

    def __init__(
        self,
        plan: Plan,
        context: tuple[int, ...],
        codec: ChatCodec,
        args: SynthesisConfig,
        window: int | None = None,
    ) -> None:
        self.plan, self.context, self.codec, self.args, self.window = plan, context, codec, args, window
        self.lost: str | None = None  # why it came to nothing, where that is nothing a filter would say
        self._questions: list[str] = []
        self._prompts: list[list[int]] = []  # what each answer was sampled behind
        self._answers: list[list[int]] = []
        self._asked: list[Generation] = []
        self._answered: list[Generation] = []
        self._over = False
        if plan.question:
            self._questions.append(plan.question)
            self._asked.append(Generation([], ended=True))

    def next(self) -> Request | None:
        """What is to be sampled next; `None` when the conversation is over."""
        round_number = len(self._answers)
        if self._over or round_number == self.args.num_rounds:
            return None
        asking = len(self._questions) == round_number
        if asking:
            prompt, longest = self._asking(), self.args.max_question_tokens
            temperature, side = self.args.question_temperature, "question"
        else:
            try:
                prompt, longest = self.codec.encode_prompt(self._questions, self._answers), self.args.max_answer_tokens
            except ValueError:
                self._lose("not_renderable")
                return None
            temperature, side = self.args.answer_temperature, "answer"
            self._prompts.append(prompt)
        if self.window is not None and len(self.context) + len(prompt) + longest > self.window:
            self._lose("too_long")
            return None
        seed = random.Random(f"{self.plan.seed}/{round_number}/{side}").getrandbits(62)
        return Request(self.context, prompt, longest, temperature, seed)

    def receive(self, generation: Generation | None) -> None:
        """What was sampled; `None` if the engine refused to."""
        if generation is None:
            self._lose("refused_by_engine")
        elif len(self._questions) == len(self._answers):
            self._asked.append(generation)
            # Without thoughts, and without quotation marks around it.
            question = self.codec.read(generation.token_ids).strip().strip('"“”').strip()
            if question:
                self._questions.append(f"{question} {self.plan.reasoning}".strip())
            self._over = not question
        else:
            self._answered.append(generation)
            self._answers.append(self.codec.take_answer(generation.token_ids))
            # Empty where a thinking model did not come to the end of its thought.
            self._over = not self._answers[-1]

    @property
    def generated(self) -> int:
        """Tokens that were sampled so far."""
        return sum(len(one.token_ids) for one in (*self._asked, *self._answered))

    def conversation(self, chunk_id: str | None) -> Conversation:
        """What was said, as it is trained; without turns if it came to nothing. What an engine said of an answer's
        tokens is kept where they stand behind the very tokens that they were sampled behind."""
        answers = [answer for answer in self._answers if answer]
        questions = self._questions[: len(answers)]
        turns: list[Turn] = []
        front: list[int] = []
        try:
            exchanges = self.codec.encode_dialogue(questions, answers) if answers and self.lost is None else []
        except ValueError:
            exchanges, self.lost = [], "not_renderable"
        for number, (prompt_ids, answer_ids) in enumerate(exchanges):
            asked, answered = self._asked[number], self._answered[number]
            front += prompt_ids
            same = front == self._prompts[number] and answer_ids == answered.token_ids
            front += answer_ids
            turns.append(
                Turn(
                    questions[number],
                    prompt_ids,
                    answer_ids,
                    self._ended(asked),
                    self._ended(answered),
                    answered.top_k if same else None,
                )
            )
        return Conversation(chunk_id, self.plan.seed_type, turns)

    def _asking(self) -> list[int]:
        """Token ids for the asking side, to whom the questions are its own and the answers the user's. They are not
        trained on, so it does not matter that they are encoded anew."""
        messages = [{"role": "user", "content": self.plan.prompt}]
        for number, (question, answer) in enumerate(zip(self._questions, self._answers, strict=True)):
            follow_up = random.Random(f"{self.plan.seed}/{number}").choice(self.plan.follow_ups)
            messages.append({"role": "assistant", "content": question})
            messages.append({"role": "user", "content": f"{self.codec.read(answer)}\n\n{follow_up}"})
        return self.codec.encode_request(messages)

    def _lose(self, reason: str) -> None:
        self.lost, self._over = reason, True

    def _ended(self, generation: Generation) -> bool:
        return generation.ended or self.codec.has_ended(generation.token_ids)
