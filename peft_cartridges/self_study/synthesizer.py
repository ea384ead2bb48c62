"""`SelfStudySynthesizer`: a model writes conversations about a corpus, and how it would answer with it in context."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attention import shared_prefix
from ..chat import get_tokenizer
from ..hidden_states import predicting_states
from ..kv_prefix import KVPrefix
from .backends import TransformersBackend
from .chunking import Chunk, as_documents, chunk_corpus
from .conversation import Conversation, encode_answer, encode_question
from .recitation import draw_recitation, split_sentences
from .seed_prompts import draw_seed_prompt
from .synthesis_config import SynthesisConfig

FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "input_ids": List(Value("int32")),
        "completion_mask": List(Value("int8")),
        "teacher_hidden_states": List(Value("float16")),
        "chunk_id": Value("string"),
        "context": Value("string"),
        "seed_type": Value("string"),
    }
)


class SelfStudySynthesizer:
    """Makes a self-study data set (arXiv 2506.06266): for each chunk of a corpus the model asks questions (A) and
    answers them (B), both with the chunk in context, which is prefilled once and shared by all.

    Args:
        model: A transformers causal LM, or a PEFT model (its cartridge is disabled meanwhile).
        processing_class: Its tokenizer or processor, with a chat template.
        args: Settings.

    Example:

    ```python
    dataset = SelfStudySynthesizer(model, tokenizer, SynthesisConfig(num_conversations=512)).synthesize(text)
    ```
    """

    def __init__(self, model: nn.Module, processing_class: Any, args: SynthesisConfig | None = None) -> None:
        self.model = model
        self.processing_class = processing_class
        self.args = args if args is not None else SynthesisConfig()
        self._backend = TransformersBackend(model, processing_class, batch_size=self.args.generation_batch_size)

    def synthesize(self, corpus: Any) -> Dataset:
        """The data set of a corpus.

        Args:
            corpus: A text, several texts, or rows with a `text` column; see `as_documents`.

        Returns:
            Rows with `messages`, `input_ids` (what the student sees behind its cartridge), `completion_mask` (1 where a
            token is learned), `teacher_hidden_states` (flat `[learned tokens * hidden_size]`, what predicts them),
            `chunk_id`, `context` (the chunk as the teacher has it in context) and `seed_type`.

        Raises:
            ValueError: the corpus is empty or has no `text`.
        """
        documents = as_documents(corpus)
        chunks = chunk_corpus(
            documents,
            self.processing_class,
            min_tokens=self.args.min_chunk_tokens,
            max_tokens=self.args.max_chunk_tokens,
            seed=self.args.seed,
        )
        rows: list[dict[str, Any]] = []
        total = self.args.num_conversations
        with self._plain_model(), tqdm(total=total, desc="Self-study", unit="conversation") as progress:
            for number, chunk in enumerate(chunks):
                wanted = min(self.args.conversations_per_chunk, total - len(rows))
                if wanted <= 0:
                    break
                rng = random.Random(f"{self.args.seed}/{number}")
                torch.manual_seed(rng.getrandbits(63))
                for row in self._study(chunk, wanted, rng):
                    rows.append(row)
                    progress.update()
        return Dataset.from_list(rows, features=FEATURES)

    def _study(self, chunk: Chunk, num_conversations: int, rng: random.Random) -> Iterator[dict[str, Any]]:
        """The rows of one chunk."""
        prefix = KVPrefix.from_text(self.model, self.processing_class, chunk.context)
        with shared_prefix(self.model, prefix):
            conversations = self._converse(chunk, num_conversations, rng)
            targets = predicting_states(
                self.model, [c.turn_ids for c in conversations], [len(c.answer_ids) for c in conversations]
            )
        for conversation, target in zip(conversations, targets, strict=True):
            row = conversation.to_row(self.processing_class)
            yield {**row, "context": chunk.context, "teacher_hidden_states": _as_float16(target)}

    def _converse(self, chunk: Chunk, num_conversations: int, rng: random.Random) -> list[Conversation]:
        num_recitations = round(num_conversations * self.args.recitation_share)
        recitations = [self._recite(chunk, rng) for _ in range(num_recitations)]
        return recitations + self._ask_and_answer(chunk, num_conversations - num_recitations, rng)

    def _recite(self, chunk: Chunk, rng: random.Random) -> Conversation:
        question, answer = draw_recitation(chunk.text, rng)
        prompt_ids = encode_question(self.processing_class, question)
        answer_ids = encode_answer(self.processing_class, question, answer)
        return Conversation(chunk.id, "recitation", question, prompt_ids, answer_ids)

    def _ask_and_answer(self, chunk: Chunk, number: int, rng: random.Random) -> list[Conversation]:
        if number == 0:
            return []
        types = list(
            itertools.islice(itertools.cycle(rng.sample(self.args.seed_types, len(self.args.seed_types))), number)
        )
        sentences = split_sentences(chunk.text)
        seeds = []
        for seed_type in types:
            passage = rng.choice(sentences) if rng.random() < self.args.focus_share else None
            seeds.append(encode_question(self.processing_class, draw_seed_prompt(seed_type, rng, passage=passage)))
        asked = self._backend.generate(
            seeds, max_new_tokens=self.args.max_question_tokens, temperature=self.args.question_temperature
        )
        questions = [self._decode(ids) for ids in asked]
        prompts = [encode_question(self.processing_class, question) for question in questions]
        answers = self._backend.generate(
            prompts, max_new_tokens=self.args.max_answer_tokens, temperature=self.args.answer_temperature
        )
        return [
            Conversation(chunk.id, seed_type, question, prompt, answer)
            for seed_type, question, prompt, answer in zip(types, questions, prompts, answers, strict=True)
            if question and answer
        ]

    def _decode(self, ids: list[int]) -> str:
        return get_tokenizer(self.processing_class).decode(ids, skip_special_tokens=True).strip().strip('"“”').strip()

    @contextlib.contextmanager
    def _plain_model(self) -> Iterator[None]:
        """The model without its cartridge and in evaluation mode."""
        training = self.model.training
        self.model.eval()
        disabled = self.model.disable_adapter() if isinstance(self.model, PeftModel) else contextlib.nullcontext()
        try:
            with disabled:
                yield
        finally:
            self.model.train(training)


def _as_float16(hidden: Tensor) -> np.ndarray:
    flat = hidden.float().cpu().numpy().reshape(-1)
    if np.abs(flat).max(initial=0.0) > np.finfo(np.float16).max:
        raise ValueError(
            "The teacher's hidden states exceed the range of float16, in which they are kept. Please report the model."
        )
    return flat.astype(np.float16)
