"""Rows that are finished in the training step: what the teacher says about them, and answers of the student's own.

Nothing is stored then. The teacher is the same model without its cartridge and with a row's chunk in context; the rows
of a batch are grouped by chunk, and a chunk is read once for all of them. Off-policy, the student learns from answers
that the teacher wrote; on-policy (arXiv 2306.13649) from its own, which it samples with the current cartridge.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..attention import shared_prefix
from ..chat import encode_preamble
from ..hidden_states import predicting_states
from ..kv_prefix import KVPrefix, evaluating
from ..self_study.backends import TransformersBackend
from ..self_study.conversation import encode_question
from .batches import STATES, TOP_K, has_targets

Row = dict[str, Any]


class LiveTeacher:
    """The model without its cartridge and with a chunk in context, in process.

    Args:
        model: The PEFT model that is trained.
        processing_class: Its tokenizer or processor.
        cache_size: How many chunks' prefixes are kept; the one that was not used for the longest time goes first.
    """

    def __init__(self, model: PeftModel, processing_class: Any, *, cache_size: int = 16) -> None:
        self.model = model
        self.processing_class = processing_class
        self.cache_size = cache_size
        self.num_prefilled = 0  # chunks read so far
        self._prefixes: OrderedDict[str, KVPrefix] = OrderedDict()

    def states(
        self, contexts: Sequence[str], rows: Sequence[Sequence[int]], num_predicted: Sequence[int]
    ) -> list[Tensor]:
        """Final hidden states `[num_predicted[i], hidden_size]` that predict the last tokens of row i behind its
        context. Rows of one context are computed together."""
        results: list[Tensor] = [torch.empty(0)] * len(rows)
        with self.model.disable_adapter(), evaluating(self.model):
            for context in dict.fromkeys(contexts):
                chosen = [index for index, other in enumerate(contexts) if other == context]
                with shared_prefix(self.model, self._prefix(context)):
                    states = predicting_states(
                        self.model, [rows[i] for i in chosen], [num_predicted[i] for i in chosen]
                    )
                for index, state in zip(chosen, states, strict=True):
                    results[index] = state
        return results

    def _prefix(self, context: str) -> KVPrefix:
        if context not in self._prefixes:
            self.num_prefilled += 1
            self._prefixes[context] = KVPrefix.from_text(self.model, self.processing_class, context)
            if len(self._prefixes) > self.cache_size:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(context)
        return self._prefixes[context]


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
        self._engine = TransformersBackend(teacher.model, teacher.processing_class, batch_size=generation_batch_size)
        self._preamble = encode_preamble(teacher.processing_class)

    def for_training(self, rows: Sequence[Row], seed: str) -> list[Row]:
        """The rows finished. What is drawn depends on `seed` and the cartridge alone, so a resumed run draws the same."""
        rng = random.Random(seed)
        finished = [{**row, "start": self._start_of_turns(row)} for row in rows]
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
            [{**row, "start": self._start_of_turns(row)} if any(row["completion_mask"]) else dict(row) for row in rows]
        )

    def _answer(self, rows: list[Row], seeds: list[int]) -> None:
        if not rows:
            return
        prompts = [list(row["input_ids"][: _first_learned(row)]) for row in rows]
        with evaluating(self.teacher.model), torch.random.fork_rng():
            answers = self._engine.generate(
                prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seeds=seeds
            )
        for row, prompt, answer in zip(rows, prompts, answers, strict=True):
            row["input_ids"] = prompt + answer.token_ids
            row["completion_mask"] = [0] * len(prompt) + [1] * len(answer.token_ids)
            _drop_targets(row)

    def _learn_question(self, row: Row) -> None:
        """Sets a weight on what stands between `start`, where the turns begin, and the answer. The first token of the turns is
        predicted by what stands in front of them, which teacher and student differ in, so it is left out."""
        start, first = row["start"] + 1, _first_learned(row)
        length = len(row["input_ids"])
        row["completion_mask"] = [
            int(index >= start or bool(learned)) for index, learned in enumerate(row["completion_mask"])
        ]
        row["loss_weights"] = [self.prompt_loss_weight] * first + [1.0] * (length - first)
        _drop_targets(row)

    def _scored(self, rows: list[Row]) -> list[Row]:
        unscored = [row for row in rows if not _has_targets(row) and any(row["completion_mask"])]
        counts = [len(row["input_ids"]) - _first_learned(row) for row in unscored]
        turns = [list(row["input_ids"][row["start"] :]) for row in unscored]
        found = self.teacher.states([row["context"] for row in unscored], turns, counts) if unscored else []
        for row, states in zip(unscored, found, strict=True):
            learned = torch.tensor(row["completion_mask"][-len(states) :], dtype=torch.bool, device=states.device)
            row[STATES] = states[learned]
        return rows

    def _start_of_turns(self, row: Row) -> int:
        """Length of what stands in front of the turns for the student only: the teacher has its context there."""
        ids = list(row["input_ids"])
        prompt = ids[: _first_learned(row)]
        asked = [message["content"] for message in row.get("messages") or [] if message["role"] == "user"]
        if asked:
            question = encode_question(self.teacher.processing_class, asked[0])
            if prompt[-len(question) :] == question:
                return len(prompt) - len(question)
        return len(self._preamble) if ids[: len(self._preamble)] == self._preamble else 0


def _has_targets(row: Row) -> bool:
    return has_targets([name for name, value in row.items() if value is not None])


def _first_learned(row: Row) -> int:
    return list(row["completion_mask"]).index(1)


def _drop_targets(row: Row) -> None:
    for name in (STATES, *TOP_K):
        row.pop(name, None)
