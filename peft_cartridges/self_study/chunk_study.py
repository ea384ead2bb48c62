"""The conversations about one chunk: made, judged, and given the teacher's targets."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..chat import ChatCodec
from .backends.base import Backend, ContextSession
from .chunking import Chunk
from .conversation import Conversation
from .dialogue import Dialogue, SeedPrompts, plan_dialogues, recite
from .quality import Candidate, QualityFilter, make_filters
from .synthesis_config import SynthesisConfig
from .teacher_targets import Targets, TopK


@dataclass
class ChunkReport:
    """What came of a chunk.

    Args:
        chunk: Id, document, start and end.
        made, kept: Conversations.
        dropped: How many for which reason.
        generated_tokens: Of all that were made.
    """

    chunk: dict[str, Any]
    made: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    generated_tokens: int = 0

    def without(self, lost: Counter[str]) -> ChunkReport:
        """The report when further conversations are dropped, `lost` of them for which reason."""
        return replace(self, kept=self.kept - lost.total(), dropped=self.dropped + lost)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(+self.dropped)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChunkReport:
        return cls(**{**values, "dropped": Counter(values["dropped"])})


@dataclass(frozen=True)
class _Scored:
    conversation: Conversation
    targets: Targets
    usefulness: float | None = None


class ChunkStudy:
    """Studies one chunk after another.

    Args:
        backend: What generates and scores.
        codec: Renders and reads conversations.
        args: Settings.
        seed_prompts: Used instead of the built-in ones.
    """

    def __init__(
        self, backend: Backend, codec: ChatCodec, args: SynthesisConfig, seed_prompts: SeedPrompts | None = None
    ) -> None:
        self.backend = backend
        self.codec = codec
        self.args = args
        self.seed_prompts = seed_prompts
        self.measures = args.min_usefulness > 0 or args.oversampling > 1

    def study(self, chunk: Chunk, wanted: int, rng: random.Random) -> tuple[list[dict[str, Any]], ChunkReport]:
        """Rows of the data set about a chunk (at most `wanted`), and what came of it.

        Raises:
            ValueError: chunk and conversation are longer than the model's window.
        """
        system_prompt = rng.choice(self.args.system_prompts) if self.args.system_prompts else ""
        context = f"{system_prompt}\n\n{chunk.context}" if system_prompt else chunk.context
        context_ids = self.codec.encode_context(context)
        if system_prompt:
            preamble = self.codec.encode_context(system_prompt)
        else:
            preamble = self.codec.preamble
        filters = make_filters(self.args.quality_filters, max_similarity=self.args.max_similarity)
        report = ChunkReport({"id": chunk.id, "document": chunk.document_id, "start": chunk.start, "end": chunk.end})
        num_recitations = round(wanted * self.args.recitation_share)
        recitations: list[_Scored] = []
        dialogues: list[_Scored] = []
        for _ in range(self.args.max_attempts):
            missing = (num_recitations - len(recitations), wanted - num_recitations - len(dialogues))
            if not any(missing):
                break
            with self.backend.in_context(context_ids) as session:
                made = self._make(session, chunk, missing, rng, len(context_ids))
                passed = [c for c in made if self._passes(c, chunk, filters, report)]
                scored = self._score(session, passed)
            report.made += len(made)
            report.generated_tokens += sum(turn.generated for c in made for turn in c.turns)
            recitations += [one for one in scored if one.conversation.seed_type == "recitation"][: missing[0]]
            found = [one for one in scored if one.conversation.seed_type != "recitation"]
            dialogues += self._most_useful(found, preamble, missing[1], report)
        kept = recitations + dialogues
        report.kept = len(kept)
        return [self._row(one, context, preamble) for one in kept], report

    def _make(
        self, session: ContextSession, chunk: Chunk, missing: tuple[int, int], rng: random.Random, context_length: int
    ) -> list[Conversation]:
        recitations = [recite(chunk, self.codec, rng) for _ in range(missing[0])]
        number = math.ceil(missing[1] * self.args.oversampling)
        plans = plan_dialogues(chunk, number, rng, self.args, self.seed_prompts)
        room = None if self.backend.max_length is None else self.backend.max_length - context_length
        longest = max((len(one.turn_ids) for one in recitations), default=0)
        if room is not None and longest > room:
            raise ValueError(
                f"The chunk {chunk.id} fills the model's window: {room} tokens are left, a recitation needs {longest}. "
                "Lower `max_chunk_tokens`."
            )
        dialogue = Dialogue(session, self.codec, self.args, room)
        return recitations + dialogue.hold(chunk, plans)

    def _passes(
        self, conversation: Conversation, chunk: Chunk, filters: dict[str, QualityFilter], report: ChunkReport
    ) -> bool:
        candidate = Candidate(
            conversation.messages(self.codec),
            chunk.text,
            conversation.seed_type,
            [turn.question_ended for turn in conversation.turns],
            [turn.answer_ended for turn in conversation.turns],
        )
        # Without an answer there is nothing to learn, whatever the filters are.
        reason = None if any(conversation.learned) else "empty"
        reason = reason or next((name for name, filter in filters.items() if filter.drops(candidate)), None)
        if reason is not None:
            report.dropped[reason] += 1
        return reason is None

    def _score(self, session: ContextSession, conversations: Sequence[Conversation]) -> list[_Scored]:
        """The teacher's targets: those that came with the tokens, or else by running over the conversation again."""
        silent = [c for c in conversations if any(turn.top_k is None for turn in c.turns)]
        computed = iter(self._targets(session, silent, []))
        return [
            _Scored(c, TopK.concatenate(given) if len(given) == len(c.turns) else next(computed))
            for c in conversations
            for given in [[turn.top_k for turn in c.turns if turn.top_k is not None]]
        ]

    @staticmethod
    def _targets(session: ContextSession, conversations: Sequence[Conversation], front: list[int]) -> list[Targets]:
        if not conversations:
            return []
        marks = [c.learned for c in conversations]
        spans = [len(learned) - learned.index(1) for learned in marks]
        found = session.targets([front + c.turn_ids for c in conversations], spans)
        return [
            targets.select([i for i, mark in enumerate(learned[-span:]) if mark])
            for targets, learned, span in zip(found, marks, spans, strict=True)
        ]

    def _most_useful(
        self, scored: list[_Scored], preamble: list[int], wanted: int, report: ChunkReport
    ) -> list[_Scored]:
        """Those that the model could not have answered without the chunk, the best of them if there are too many."""
        if not self.measures or not scored:
            return scored[:wanted]
        with self.backend.in_context([]) as session:
            without = self._targets(session, [one.conversation for one in scored], preamble)
        measured = [
            _Scored(one.conversation, one.targets, self.backend.divergence(one.targets, other))
            for one, other in zip(scored, without, strict=True)
        ]
        useful = [one for one in measured if (one.usefulness or 0.0) >= self.args.min_usefulness]
        best = sorted(range(len(useful)), key=lambda i: -(useful[i].usefulness or 0.0))[:wanted]
        report.dropped["not_useful"] += len(measured) - len(useful)
        report.dropped["less_useful"] += len(useful) - len(best)
        return [useful[i] for i in sorted(best)]

    def _row(self, one: _Scored, context: str, preamble: list[int]) -> dict[str, Any]:
        targets = one.targets
        if self.args.teacher_targets == "top_k":
            targets = self.backend.top_k(targets, self.args.teacher_top_k, self.args.teacher_top_k_mass)
        row = {**one.conversation.to_row(self.codec, preamble), "context": context, **targets.columns()}
        return {**row, "usefulness": one.usefulness} if self.measures else row
