"""The conversations of a part: which there are to be, those that a filter dropped made anew, and the rows that come of it.

What a conversation becomes depends on the set's seed and its own place alone, so a set can be extended, and whoever makes
a part, in whatever order its answers come, makes the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat import ChatCodec
from ..conversations.folder import Part
from ..conversations.report import new_part_report
from ..conversations.targets import TopK
from ..corpus import Chunk
from .conversation import Conversation
from .dialogue import Dialogue, SeedPrompts, plan_dialogue, recite
from .engines import Outcome, Request
from .off_context import GENERAL, GIVEN, GivenConversations, general_request, given_conversation, plan_general
from .quality import Candidate, make_filters
from .synthesis_config import SynthesisConfig

RECITATION = "recitation"


@dataclass
class _Place:
    """A conversation that is wanted.

    Args:
        name: Its place in the chunk.
        kind: Its seed type, `recitation`, or a seed type of general conversations.
        made: What came of it.
    """

    name: str
    kind: str
    made: Conversation | None = None


def kind_at(args: SynthesisConfig, chunk: int, index: int) -> str:
    """Whether conversation `index` about a chunk is a recitation, or its seed type: alike often in every stretch of the
    set, wherever it ends."""
    number = chunk * args.conversations_per_chunk + index
    before = math.floor(number * args.recitation_share + 1e-9)
    if math.floor((number + 1) * args.recitation_share + 1e-9) > before:
        return RECITATION
    return _seed_type(args, number - before)


def _seed_type(args: SynthesisConfig, number: int) -> str:
    turn, place = divmod(number, len(args.seed_types))
    order = random.Random(f"{args.synthesis_seed}/types/{turn}").sample(args.seed_types, len(args.seed_types))
    return order[place]


def num_dialogues(args: SynthesisConfig, part: Part) -> int:
    """How many conversations of a part are about its chunk and no recitations."""
    if part.is_off_context:
        return 0
    return sum(kind_at(args, part.chunk, index) != RECITATION for index in range(part.first, part.end))


class PartStudy:
    """Makes the conversations of one part.

    Args:
        part: Which.
        chunk: What they are about; `None` off context.
        codec: Renders and reads conversations.
        args: Settings.
        seed_prompts: Used instead of the built-in ones.
        window: Tokens that context and turns may have together; `None` where that is unknown.
        constants: Columns that are the same in all rows of the set.
        address: Of the set; names its conversations.
        bare_preamble: What stands in front of a conversation off context where `args.system_prompts` has nothing.
        given: General conversations of the user's, instead of those that the model writes.
    """

    def __init__(
        self,
        part: Part,
        chunk: Chunk | None,
        codec: ChatCodec,
        args: SynthesisConfig,
        *,
        seed_prompts: SeedPrompts | None = None,
        window: int | None = None,
        constants: Mapping[str, Any] | None = None,
        address: str = "",
        bare_preamble: Sequence[int] = (),
        given: GivenConversations | None = None,
    ) -> None:
        self.part, self.chunk, self.codec, self.args = part, chunk, codec, args
        self.seed_prompts, self.window = seed_prompts, window
        self._constants, self._address, self._given_rows = dict(constants or {}), address, given
        system_prompts = args.system_prompts
        system = random.Random(f"{args.synthesis_seed}/{part.about}").choice(system_prompts) if system_prompts else ""
        self.preamble = codec.encode_context(system) if system else codec.preamble
        self.context_text: str | None = None
        if chunk is None:
            self.context = tuple(self.preamble if system else bare_preamble)
        else:
            self.context_text = f"{system}\n\n{chunk.context}" if system else chunk.context
            self.context = tuple(codec.encode_context(self.context_text))
        self.report = new_part_report(chunk)
        self._filters = make_filters(args.quality_filters, max_similarity=args.max_similarity)
        self._places = [_Place(str(i), self._kind(i)) for i in range(part.first, part.end)]
        dialogues = num_dialogues(args, part)
        for number in range(math.ceil(dialogues * args.oversampling) - dialogues):
            self._places.append(_Place(f"{part.first}x{number}", _seed_type(args, number)))
        self._attempt = 0
        self._held: list[tuple[_Place, Dialogue]] = []  # of this attempt
        self._given: list[tuple[_Place, Conversation | None]] = []  # recitations of this attempt
        self._waiting_for: dict[Request, Dialogue] = {}
        self.settled = 0  # conversations that are over, for a progress bar
        self.finished = False

    def _kind(self, index: int) -> str:
        if self.chunk is None:
            return GENERAL if self._given_rows is None else GIVEN
        return kind_at(self.args, self.part.chunk, index)

    def begin(self) -> list[Request]:
        """What is to be sampled first."""
        return self._next_attempt()

    def receive(self, outcome: Outcome) -> list[Request]:
        """What is to be sampled now that this was."""
        dialogue = self._waiting_for.pop(outcome.request)
        dialogue.receive(outcome.generation)
        if (request := dialogue.next()) is not None:
            self._waiting_for[request] = dialogue
            return [request]
        if self._waiting_for:
            return []
        self._judge()
        return self._next_attempt()

    def longest_recitation(self) -> int:
        """Tokens of the longest recitation that was drawn last."""
        return max((len(made.turn_ids) for _, made in self._given if made is not None), default=0)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of what was kept, with the top k of the learned tokens where the engine gave them along."""
        return [self._row(place, place.made) for place in self._places if place.made is not None]

    def _next_attempt(self) -> list[Request]:
        while self._attempt < self.args.max_attempts:
            missing = [place for place in self._places if place.made is None]
            if not missing:
                break
            self._held, self._given = [], []
            for place in missing:
                rng = random.Random(f"{self.args.synthesis_seed}/{self.part.about}/{place.name}/{self._attempt}")
                question, answer = self._given_exchange(place)
                if place.kind == RECITATION or answer:
                    self._given.append((place, self._ready_made(rng, question, answer)))
                    continue
                if self.chunk is None:
                    plan = plan_general(place.kind, rng, question)
                else:
                    plan = plan_dialogue(self.chunk, place.kind, rng, self.args, self.seed_prompts)
                dialogue = Dialogue(plan, self.context, self.codec, self.args, self.window)
                self._held.append((place, dialogue))
                if (request := dialogue.next()) is not None:
                    self._waiting_for[request] = dialogue
            self._attempt += 1
            if self._waiting_for:
                return list(self._waiting_for)
            self._judge()
        self.finished = True
        self.report["kept"] = sum(place.made is not None for place in self._places)
        return []

    def _given_exchange(self, place: _Place) -> tuple[str, str]:
        """A question and its answer, of which one or both may be the model's to find: those are empty."""
        if place.kind == GIVEN:
            return self._given_rows[int(place.name)]  # type: ignore[index]
        if place.kind == GENERAL and place.name.isdigit() and self._attempt == 0:
            return general_request(int(place.name), self.args.synthesis_seed), ""
        return "", ""

    def _ready_made(self, rng: random.Random, question: str, answer: str) -> Conversation | None:
        """A recitation, or what was given."""
        try:
            if self.chunk is None:
                return given_conversation(question, answer, self.codec, self.args)
            return recite(self.chunk, self.codec, rng)
        except ValueError:  # what the chat template would change
            return None

    def _judge(self) -> None:
        """Looks at what this attempt gave, in the order of the places, whatever the order it came in."""
        about = None if self.chunk is None else self.chunk.id
        results = [(place, made, "not_renderable") for place, made in self._given]
        results += [(place, one.conversation(about), one.lost or "empty") for place, one in self._held]
        self.report["generated_tokens"] += sum(one.generated for _, one in self._held)
        order = {place.name: number for number, place in enumerate(self._places)}
        for place, made, lost in sorted(results, key=lambda result: order[result[0].name]):
            self.report["made"] += 1
            reason = self._reason_to_drop(made, lost)
            if reason is None:
                place.made = made
                self.settled += 1
            else:
                self.report["dropped"][reason] += 1

    def _reason_to_drop(self, made: Conversation | None, lost: str) -> str | None:
        # Without an answer there is nothing to learn, whatever the filters are.
        if made is None or not any(made.learned):
            return lost
        if self.window is not None and len(self.context) + len(made.turn_ids) > self.window:
            return "too_long"
        candidate = Candidate(
            made.messages(self.codec),
            self.chunk.text if self.chunk is not None else "",
            made.seed_type,
            [turn.question_ended for turn in made.turns],
            [turn.answer_ended for turn in made.turns],
        )
        return next((name for name, one in self._filters.items() if one.drops(candidate)), None)

    def _row(self, place: _Place, made: Conversation) -> dict[str, Any]:
        given = [turn.top_k for turn in made.turns if turn.top_k is not None]
        columns: dict[str, Any] = {"teacher_top_k_ids": None, "teacher_top_k_logprobs": None}
        if len(given) == len(made.turns):
            columns = TopK.concatenate(given).columns()
        return {
            **made.to_row(self.codec, self.preamble),
            "id": f"{self._address[:12]}-{self.part.about}-{place.name}",
            "context": self.context_text,
            **columns,
            **self._constants,
        }
