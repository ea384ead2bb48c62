"""Rows that are finished in the training step: what the teacher says about them, and answers of the student's own.

Nothing is stored then. The teacher is the same model without its cartridge and with a row's chunk in context; the rows
of a batch are grouped by chunk, and a chunk is read once for all of them. Off-policy, the student learns from answers
that the teacher wrote; on-policy (arXiv 2306.13649) from its own, which it samples with the current cartridge.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..chat import ChatCodec
from ..hidden_states import predicting_states
from ..kv_prefix import evaluating
from ..self_study import TransformersEngine
from ..self_study.engines.engine import Request
from ..self_study.engines.transformers import ContextPrefixes, bare
from ..self_study.off_context import context_of_teacher
from .batches import STATES, TOP_K, has_targets

Row = dict[str, Any]


class LiveTeacher:
    """The model without its cartridge and with a chunk in context, in process.

    Args:
        model: The PEFT model that is trained.
        codec: Renders a context.
        cache_size: How many chunks' prefixes are kept; the one that was not used for the longest time goes first.
        bare_preamble: What stands in front of a row off context, see `context_of_teacher`.
    """

    def __init__(
        self, model: PeftModel, codec: ChatCodec, *, cache_size: int = 16, bare_preamble: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.codec = codec
        self.bare_preamble = bare_preamble
        self.prefixes = ContextPrefixes(model, cache_size)

    def states(self, rows: Sequence[Row], num_predicted: Sequence[int]) -> list[Tensor]:
        """Final hidden states `[num_predicted[i], hidden_size]` that predict the last tokens of row i behind its
        context; without one, of the model as it is. Rows of one context are computed together."""
        results: list[Tensor] = [torch.empty(0)] * len(rows)
        seen = [context_of_teacher(row, self.codec, self.bare_preamble) for row in rows]
        with bare(self.model):
            for context in dict.fromkeys(context for context, _ in seen):
                chosen = [index for index, (own, _) in enumerate(seen) if own == context]
                with self.prefixes.behind(context):
                    states = predicting_states(
                        self.model, [seen[i][1] for i in chosen], [num_predicted[i] for i in chosen]
                    )
                for index, state in zip(chosen, states, strict=True):
                    results[index] = state
        return results


class LiveTargets:
    """Finishes rows: gives those their targets that have none, those that are answered anew, and, with a weight on
    questions, all.

    Args:
        teacher: Scores the rows.
        on_policy_fraction: Share of the rows whose answer is sampled anew by the model with its cartridge.
        prompt_loss_weight: Weight of the question's tokens beside the answer's 1. Stored targets cover the answers
            only, so above 0 the teacher scores every row anew.
        needs_teacher: False for an objective that learns the written tokens.
        max_new_tokens, temperature: Of the sampled answers.
        generation_batch_size: Rows decoded together.
    """

    def __init__(
        self,
        teacher: LiveTeacher,
        *,
        on_policy_fraction: float = 0.0,
        prompt_loss_weight: float = 0.0,
        needs_teacher: bool = True,
        max_new_tokens: int = 96,
        temperature: float = 1.0,
        generation_batch_size: int = 64,
    ) -> None:
        self.teacher = teacher
        self.on_policy_fraction = on_policy_fraction
        self.prompt_loss_weight = prompt_loss_weight
        self.needs_teacher = needs_teacher
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self._engine = TransformersEngine(teacher.model, teacher.codec, batch_size=generation_batch_size)

    def for_training(self, rows: Sequence[Row], seed: str) -> list[Row]:
        """The rows finished. What is drawn depends on `seed` and the cartridge alone, so a resumed run draws the same."""
        rng = random.Random(seed)
        finished = [{**row, "turns_start": self._start_of_turns(row)} for row in rows]
        wanted = self.on_policy_fraction * len(finished)
        number = int(wanted) + (rng.random() < wanted % 1)
        answered = [finished[index] for index in sorted(rng.sample(range(len(finished)), number))]
        self._answer(answered, [rng.getrandbits(31) for _ in answered])
        if self.prompt_loss_weight:
            for row in finished:
                self._learn_question(row)
        return self._scored(finished) if self.needs_teacher else finished

    def for_evaluation(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the teacher's targets, as they were written."""
        return self._scored(
            [
                {**row, "turns_start": self._start_of_turns(row)} if any(row["completion_mask"]) else dict(row)
                for row in rows
            ]
        )

    def _answer(self, rows: list[Row], seeds: list[int]) -> None:
        """Has the model with its cartridge answer the first question of each row; one that gives no answer stays."""
        codec = self.teacher.codec
        requests = [
            Request((), self._prompt(row), self.max_new_tokens, self.temperature, seed)
            for row, seed in zip(rows, seeds, strict=True)
        ]
        found: dict[int, list[int]] = {}
        with evaluating(self.teacher.model), torch.random.fork_rng():
            waiting = list(requests)
            while waiting or self._engine.works_here:
                room = self._engine.room()
                self._engine.begin(waiting[:room])
                waiting = waiting[room:]
                for outcome in self._engine.step():
                    assert outcome.generation is not None
                    found[id(outcome.request)] = codec.take_answer(outcome.generation.token_ids)
        for row, request in zip(rows, requests, strict=True):
            if answer := found[id(request)]:
                prompt = list(row["input_ids"][: _first_learned(row)])
                row["input_ids"] = prompt + answer
                row["completion_mask"] = [0] * len(prompt) + [1] * len(answer)
                _drop_targets(row)

    def _prompt(self, row: Row) -> list[int]:
        """What the answer is sampled behind."""
        ids = list(row["input_ids"])
        asked = [message["content"] for message in row.get("messages") or [] if message["role"] == "user"]
        if not asked:
            return ids[: _first_learned(row)]
        return ids[: row["turns_start"]] + self.teacher.codec.encode_prompt(asked[:1])

    def _learn_question(self, row: Row) -> None:
        """Sets a weight on what stands between `turns_start` and the answer. The first token of the turns is
        predicted by what stands in front of them, which teacher and student differ in, so it is left out."""
        start, first = row["turns_start"] + 1, _first_learned(row)
        length = len(row["input_ids"])
        row["completion_mask"] = [
            int(index >= start or bool(learned)) for index, learned in enumerate(row["completion_mask"])
        ]
        row["loss_weights"] = [self.prompt_loss_weight] * first + [1.0] * (length - first)
        _drop_targets(row)

    def _scored(self, rows: list[Row]) -> list[Row]:
        unscored = [row for row in rows if not _has_targets(row) and any(row["completion_mask"])]
        counts = [len(row["input_ids"]) - _first_learned(row) for row in unscored]
        found = self.teacher.states(unscored, counts) if unscored else []
        for row, states in zip(unscored, found, strict=True):
            learned = torch.tensor(row["completion_mask"][-len(states) :], dtype=torch.bool, device=states.device)
            row[STATES] = states[learned]
        return rows

    def _start_of_turns(self, row: Row) -> int:
        """Length of what stands in front of the turns for the student only: the teacher has its context there."""
        if row.get("turns_start") is not None:
            return row["turns_start"]
        preamble = self.teacher.codec.preamble
        return len(preamble) if list(row["input_ids"][: len(preamble)]) == preamble else 0


def _has_targets(row: Row) -> bool:
    return has_targets([name for name, value in row.items() if value is not None])


def _first_learned(row: Row) -> int:
    return list(row["completion_mask"]).index(1)


def _drop_targets(row: Row) -> None:
    for name in (STATES, *TOP_K):
        row.pop(name, None)
