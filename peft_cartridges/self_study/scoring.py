"""Scoring: what the teacher, with the chunk in context, says of each learned token. A pass of its own over conversations
that anything may have written; each chunk is prefilled once for all conversations about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from ..chat import ChatCodec
from ..conversations.folder import Part
from ..conversations.rows import learned_tokens, make_features, rows_to_table
from ..conversations.targets import (
    HiddenStates,
    Targets,
    TopK,
    top_k_divergence,
    top_k_of_logits,
)
from ..hidden_states import OutputHead, predicting_states
from .engines import ContextPrefixes, Outcome, Request
from .engines.transformers import bare
from .off_context import context_of_teacher
from .part_study import RECITATION, num_dialogues
from .synthesis_config import SynthesisConfig

# Positions whose logits exist at a time.
_POSITIONS = 512

# The rows, and what came of them.
Scored = tuple[pa.Table, dict[str, Any]]


class ModelScorer:
    """Scores with a model in process, exactly.

    Args:
        model: A causal LM, or a PEFT model around one (its adapter is disabled meanwhile).
        codec: Renders contexts.
        args: Which targets, and whether usefulness is measured.
        prefixes: Shared with an engine of the same model.
        bare_preamble: See `context_of_teacher`.
    """

    def __init__(
        self,
        model: Any,
        codec: ChatCodec,
        args: SynthesisConfig,
        prefixes: ContextPrefixes | None = None,
        bare_preamble: Sequence[int] = (),
    ) -> None:
        self.model, self.codec, self.args, self.bare_preamble = model, codec, args, bare_preamble
        self.prefixes = prefixes or ContextPrefixes(model)
        self.head = OutputHead(model)

    @torch.no_grad()
    def score(self, part: Part, written: Dataset, changes: Mapping[str, Any] | None = None) -> Scored:
        """The rows of a part with their targets and `changes`, and how many were dropped for which reason.

        Rows whose targets cannot be kept (a state that is not finite, or beyond float16) are dropped and counted."""
        rows = written.with_format(None).to_list()
        dropped: Counter[str] = Counter()
        kept: list[dict[str, Any]] = []
        encode = ENCODERS[self.args.teacher_targets]
        with bare(self.model):
            found = self._states(rows)
            usefulness = self._usefulness(rows, found) if self.args.measures_usefulness else [None] * len(rows)
            for row, states, useful in zip(rows, found, usefulness, strict=True):
                try:
                    kept.append({**row, **(changes or {}), "usefulness": useful, **encode(self, states)})
                except UnstorableError:
                    dropped["unstorable_targets"] += 1
        return finish(part, kept, dropped, self.args)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.head(states).float()

    def _states(self, rows: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
        """States `[learned, hidden_size]` that predict each row's learned tokens, with its context in front."""
        results: list[Any] = [None] * len(rows)
        seen = [context_of_teacher(row, self.codec, self.bare_preamble) for row in rows]
        for context in dict.fromkeys(context for context, _ in seen):
            chosen = [number for number, (own, _) in enumerate(seen) if own == context]
            with self.prefixes.behind(context):
                found = self._predicting([rows[number] for number in chosen], [seen[number][1] for number in chosen])
            for number, states in zip(chosen, found, strict=True):
                results[number] = states
        return results

    def _predicting(self, rows: Sequence[dict[str, Any]], ids: Sequence[list[int]]) -> list[torch.Tensor]:
        """States for the learned tokens of rows, of whose ids the last `ids` are read."""
        places = [learned_tokens(row) for row in rows]
        spans = [len(row["input_ids"]) - int(place[0]) for row, place in zip(rows, places, strict=True)]
        found = predicting_states(self.model, ids, spans)
        return [states[(place - place[0]).to(states.device)] for states, place in zip(found, places, strict=True)]

    def _usefulness(self, rows: Sequence[dict[str, Any]], found: Sequence[torch.Tensor]) -> list[float | None]:
        """KL of the teacher from itself without the context, nats per learned token; none for recitations and off context."""
        measured = [number for number, row in enumerate(rows) if _has_usefulness(row)]
        chosen = [rows[number] for number in measured]
        without = self._predicting(chosen, [row["input_ids"] for row in chosen]) if measured else []
        results: list[float | None] = [None] * len(rows)
        for number, other in zip(measured, without, strict=True):
            total = 0.0
            for ours, theirs in zip(found[number].split(_POSITIONS), other.split(_POSITIONS), strict=True):
                p, q = (self.logits(states).log_softmax(-1) for states in (ours, theirs))
                total += float((p.exp() * (p - q)).sum())
            results[number] = total / max(len(other), 1)
        return results


class UnstorableError(ValueError):
    """Targets that the columns cannot hold."""


def _hidden_states(scorer: ModelScorer, states: torch.Tensor) -> dict[str, Any]:
    try:
        return HiddenStates(states).columns()
    except ValueError as error:
        raise UnstorableError(str(error)) from None


def _top_k(scorer: ModelScorer, states: torch.Tensor) -> dict[str, Any]:
    args = scorer.args
    parts = [top_k_of_logits(scorer.logits(some), args.teacher_top_k) for some in states.split(_POSITIONS)]
    found = TopK.concatenate(parts).cut(args.teacher_top_k, args.teacher_top_k_mass)
    if not np.isfinite(found.logprobs).all():
        raise UnstorableError("log-probabilities that are not finite")
    return found.columns()


def _nothing(scorer: ModelScorer, states: torch.Tensor) -> dict[str, Any]:
    return {}


# Kind of targets (see `conversations.targets.TARGETS`) -> its columns, from the states that predict the learned tokens.
ENCODERS: dict[str, Callable[[ModelScorer, torch.Tensor], dict[str, Any]]] = {
    "hidden_states": _hidden_states,
    "top_k": _top_k,
    "live": _nothing,
}


class EngineScoring:
    """A part that an engine scores: the top k that came with its tokens are taken, and the rest is asked for.

    Args:
        part: Which.
        written: Its rows.
        codec: Renders contexts.
        args: How many tokens, and whether usefulness is measured.
        bare_preamble: See `context_of_teacher`.
    """

    def __init__(
        self,
        part: Part,
        written: Dataset,
        codec: ChatCodec,
        args: SynthesisConfig,
        bare_preamble: Sequence[int] = (),
    ) -> None:
        self.part, self.args, self.bare_preamble = part, args, bare_preamble
        self.rows = written.with_format(None).to_list()
        self.codec = codec
        self.finished = False
        self._behind: dict[int, TopK | None] = {}
        self._without: dict[int, TopK | None] = {}
        self._asked: dict[Request, tuple[dict[int, TopK | None], int]] = {}

    def begin(self) -> list[Request]:
        for number, row in enumerate(self.rows):
            place = learned_tokens(row)
            if row.get("teacher_top_k_ids") is not None:
                self._behind[number] = _read_top_k(row, len(place))
            else:
                context, ids = context_of_teacher(row, self.codec, self.bare_preamble)
                self._ask(self._behind, number, context, ids, int(place[0]))
            if self.args.measures_usefulness and _has_usefulness(row):
                self._ask(self._without, number, (), row["input_ids"], int(place[0]))
        self.finished = not self._asked
        return list(self._asked)

    def receive(self, outcome: Outcome) -> list[Request]:
        found, number = self._asked.pop(outcome.request)
        place = learned_tokens(self.rows[number])
        top_k = outcome.generation.top_k if outcome.generation is not None else None
        found[number] = None if top_k is None else top_k.select((place - place[0]).tolist())
        self.finished = not self._asked
        return []

    def result(self) -> Scored:
        """As `ModelScorer.score`."""
        dropped: Counter[str] = Counter()
        kept = []
        for number, row in enumerate(self.rows):
            top_k, without = self._behind[number], self._without.get(number)
            if top_k is None or (number in self._without and without is None):
                dropped["refused_by_engine"] += 1
                continue
            useful = None if without is None else top_k_divergence(top_k, without)
            cut = top_k.cut(self.args.teacher_top_k, self.args.teacher_top_k_mass)
            kept.append({**row, "usefulness": useful, **cut.columns()})
        return finish(self.part, kept, dropped, self.args)

    def _ask(
        self, found: dict[int, TopK | None], number: int, context: tuple[int, ...], ids: list[int], first: int
    ) -> None:
        span = len(self.rows[number]["input_ids"]) - first
        self._asked[Request(context, list(ids), scored=span)] = (found, number)


def finish(part: Part, rows: list[dict[str, Any]], dropped: Counter[str], args: SynthesisConfig) -> Scored:
    """Drops what is not useful, keeps the best of what is too much, and makes the table."""
    if args.measures_usefulness:
        dialogues = [row for row in rows if _has_usefulness(row)]
        useful = [row for row in dialogues if row["usefulness"] >= args.min_usefulness]
        best = sorted(useful, key=lambda row: -row["usefulness"])[: num_dialogues(args, part)]
        dropped["not_useful"] += len(dialogues) - len(useful)
        dropped["less_useful"] += len(useful) - len(best)
        chosen = {row["id"] for row in best}
        rows = [row for row in rows if not _has_usefulness(row) or row["id"] in chosen]
    features = make_features(args.teacher_targets, usefulness=args.measures_usefulness)
    return rows_to_table(rows, features), {"dropped": dict(+dropped)}


def _has_usefulness(row: Mapping[str, Any]) -> bool:
    """Whether it is measured what the chunk is worth to a row: a recitation is nothing without it, and a row off context
    has none."""
    return row["seed_type"] != RECITATION and bool(row["context"])


def _read_top_k(row: dict[str, Any], length: int) -> TopK:
    ids, logprobs = (np.asarray(row[name]) for name in ("teacher_top_k_ids", "teacher_top_k_logprobs"))
    return TopK(ids.reshape(length, -1).astype(np.int32), logprobs.reshape(length, -1).astype(np.float32))


__all__ = ["ENCODERS", "EngineScoring", "ModelScorer", "Scored", "Targets"]
