"""Batches whose answers, or whose teacher's targets, are made while training: on-policy self-study.

Off-policy, the student learns from answers that the teacher wrote. On-policy (arXiv 2306.13649) it learns from its own:
the model with the current cartridge answers the question, and the same model without the cartridge and with the chunk
in context says what it would have said at every token. Both are one model in one process, so no server is needed.
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
from ..chat import ChatCodec
from ..hidden_states import pad_right, predicting_states
from ..kv_prefix import KVPrefix, evaluating
from ..self_study.backends import TransformersBackend


class LiveTeacher:
    """The model without its cartridge and with a chunk in context, in process.

    Args:
        model: The PEFT model that is trained.
        processing_class: Its tokenizer or processor, or a `ChatCodec` with it.
        cache_size: How many chunks' prefixes are kept; the one that was not used for the longest time goes first.
    """

    def __init__(self, model: PeftModel, processing_class: Any, *, cache_size: int = 16) -> None:
        self.model = model
        self.codec = ChatCodec.of(model, processing_class)
        self.cache_size = cache_size
        self._prefixes: OrderedDict[str, KVPrefix] = OrderedDict()

    def states(
        self, contexts: Sequence[str], rows: Sequence[Sequence[int]], num_predicted: Sequence[int]
    ) -> list[Tensor]:
        """Final hidden states `[num_predicted[i], hidden_size]` that predict the last tokens of row i behind its
        context. Rows of one context are computed together."""
        results: list[Tensor] = [torch.empty(0)] * len(rows)
        with self.model.disable_adapter():
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
            self._prefixes[context] = KVPrefix.from_input_ids(self.model, self.codec.encode_context(context))
            if len(self._prefixes) > self.cache_size:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(context)
        return self._prefixes[context]


class LiveBatches:
    """Turns a batch of `SelfStudyCollator` (with `contexts`) into one with live answers, or live targets.

    Args:
        teacher: Scores the rows.
        pad_token_id: Stands behind short rows.
        on_policy_fraction: Share of the rows whose answer is sampled anew by the model with its cartridge.
        prompt_loss_weight: Weight of the question's tokens beside the answer's 1. Stored targets cover the answers
            only, so above 0 the teacher scores every row anew.
        needs_teacher: False for cross-entropy, which learns the tokens.
        max_new_tokens, temperature: Of the sampled answers.
        generation_batch_size: Rows decoded together.
    """

    def __init__(
        self,
        teacher: LiveTeacher,
        *,
        pad_token_id: int,
        on_policy_fraction: float = 0.0,
        prompt_loss_weight: float = 0.0,
        needs_teacher: bool = True,
        max_new_tokens: int = 96,
        temperature: float = 1.0,
        generation_batch_size: int = 64,
    ) -> None:
        self.teacher = teacher
        self.pad_token_id = pad_token_id
        self.on_policy_fraction = on_policy_fraction
        self.prompt_loss_weight = prompt_loss_weight
        self.needs_teacher = needs_teacher
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self._backend = TransformersBackend(teacher.model, teacher.codec, batch_size=generation_batch_size)
        self._preamble = teacher.codec.preamble

    def __call__(self, batch: dict[str, Any], seed: str) -> dict[str, Any]:
        """The batch anew. What is drawn depends on `seed` and the cartridge alone, so a resumed run draws the same."""
        rng = random.Random(seed)
        contexts = batch["contexts"]
        device = batch["input_ids"].device
        rows = [_Row.of(ids, labels) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
        starts = [self._start_of_turns(row, question) for row, question in zip(rows, batch["questions"], strict=True)]
        wanted = self.on_policy_fraction * len(rows)
        number = int(wanted) + (rng.random() < wanted % 1)
        on_policy = sorted(rng.sample(range(len(rows)), number))
        with evaluating(self.teacher.model), torch.random.fork_rng():
            prompts = [rows[index].prompt for index in on_policy]
            if prompts:
                answers = self._backend.generate(
                    prompts,
                    max_new_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                    seeds=[rng.getrandbits(31) for _ in prompts],
                )
                for index, prompt, answer in zip(on_policy, prompts, answers, strict=True):
                    rows[index] = _Row(
                        prompt + answer.token_ids, [False] * len(prompt) + [True] * len(answer.token_ids)
                    )
            if self.prompt_loss_weight:
                # The first token of the turns is predicted by what stands in front, which teacher and student differ in.
                rows = [row.learning_from(start + 1) for row, start in zip(rows, starts, strict=True)]
            scored = range(len(rows)) if self.prompt_loss_weight else on_policy
            states: dict[int, Tensor] = {}
            if self.needs_teacher and len(scored):
                turns = [rows[i].ids[starts[i] :] for i in scored]
                found = self.teacher.states(
                    [contexts[i] for i in scored], turns, [rows[i].num_from_first_learned for i in scored]
                )
                for i, state in zip(scored, found, strict=True):
                    states[i] = state[torch.tensor(rows[i].learned[-len(state) :], device=state.device)]
        return self._assemble(batch, rows, states, device)

    def _start_of_turns(self, row: _Row, question: str | None) -> int:
        """Length of what stands in front of the turns for the student only: the teacher has its context there."""
        if question is not None:
            asked = self.teacher.codec.encode_dialogue([question], [()])[0].prompt_ids
            if row.prompt[-len(asked) :] == asked:
                return len(row.prompt) - len(asked)
        return len(self._preamble) if row.ids[: len(self._preamble)] == self._preamble else 0

    def _assemble(
        self, batch: dict[str, Any], rows: list[_Row], states: dict[int, Tensor], device: torch.device
    ) -> dict[str, Any]:
        labels = [[t if on else -100 for t, on in zip(r.ids, r.learned, strict=True)] for r in rows]
        result: dict[str, Any] = {
            "input_ids": pad_right([row.ids for row in rows], self.pad_token_id).to(device),
            "labels": pad_right(labels, -100).to(device),
        }
        if self.prompt_loss_weight:
            weights = torch.ones(result["labels"].shape)
            for index, row in enumerate(rows):
                weights[index, : len(row.prompt)] = self.prompt_loss_weight
            result["loss_weights"] = weights.to(device)
        if not self.needs_teacher:
            return result
        counts = (batch["labels"][:, 1:] != -100).sum(1).tolist()
        if "teacher_hidden_states" in batch:
            stored = batch["teacher_hidden_states"].split(counts)
            joined = [states.get(i, stored[i]) for i in range(len(rows))]
            result["teacher_hidden_states"] = torch.cat([state.to(joined[0].dtype) for state in joined])
        elif len(states) == len(rows):
            result["teacher_hidden_states"] = torch.cat([states[i] for i in range(len(rows))])
        else:
            kept = [i for i in range(len(rows)) if i not in states]
            for name in ("teacher_top_k_ids", "teacher_top_k_logprobs"):
                parts = batch[name].split(counts)
                result[name] = torch.cat([parts[i] for i in kept])
            if states:
                result["teacher_hidden_states"] = torch.cat([states[i] for i in sorted(states)])
                result["exact_rows"] = torch.tensor([i in states for i in range(len(rows))], device=device)
        return result


class _Row:
    """A conversation without padding: token ids, and which of them are learned."""

    def __init__(self, ids: list[int], learned: list[bool], num_prompt: int | None = None) -> None:
        self.ids = ids
        self.learned = learned
        first = learned.index(True) if any(learned) else len(learned)
        self._num_prompt = first if num_prompt is None else num_prompt

    @classmethod
    def of(cls, ids: Tensor, labels: Tensor) -> _Row:
        learned = (labels != -100).tolist()
        end = max((index for index, on in enumerate(learned) if on), default=-1) + 1
        return cls(ids[:end].tolist(), learned[:end])

    @property
    def prompt(self) -> list[int]:
        """What stands in front of the first answer."""
        return self.ids[: self._num_prompt]

    @property
    def num_from_first_learned(self) -> int:
        return len(self.ids) - (self.learned.index(True) if any(self.learned) else len(self.ids))

    def learning_from(self, start: int) -> _Row:
        """With all tokens from `start` on learned too."""
        learned = [on or index >= start for index, on in enumerate(self.learned)]
        return _Row(self.ids, learned, self._num_prompt)
