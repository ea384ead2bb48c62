"""`SelfStudySynthesizer`: a model writes conversations about a corpus, and how it would answer with it in context."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch import nn

from ..chat import ChatCodec, with_cartridge_chat_template
from .backends import Backend, TransformersBackend
from .chunk_study import ChunkStudy
from .chunking import Chunk, Chunker, Document, as_documents
from .dialogue import SeedPrompts
from .features import FEATURES, make_features
from .processes import Processes
from .progress import Progress
from .quality import Candidate, make_filters
from .run_identity import claim_folder, run_identity, write_run_file
from .shards import Shards, ShardsInMemory
from .synthesis_config import SynthesisConfig
from .synthesis_report import make_report

__all__ = ["FEATURES", "SelfStudySynthesizer"]


class SelfStudySynthesizer:
    """Makes a self-study data set (arXiv 2506.06266): for each chunk of a corpus the model asks questions (A) and
    answers them (B), both with the chunk in context, which is prefilled once and shared by all.

    Args:
        model: A transformers causal LM, or a PEFT model (its cartridge is disabled meanwhile); `None` with a `backend`
            that has a model of its own.
        processing_class: Tokenizer or processor of the model, with a chat template.
        args: Settings.
        backend: What generates and scores, instead of `model`: `VLLMBackend` or `OpenAIBackend`.
        seed_prompts: Texts, or a callable that is given a chunk and a `random.Random` and gives a text; used instead
            of the built-in seed prompts.

    Example:

    ```python
    synthesizer = SelfStudySynthesizer(model, tokenizer, SynthesisConfig(num_conversations=512))
    dataset = synthesizer.synthesize(text, output_dir="handbook-self-study")
    ```

    Raises:
        ValueError: the back end cannot give the targets that `args.teacher_targets` wants.
    """

    def __init__(
        self,
        model: nn.Module | None,
        processing_class: Any,
        args: SynthesisConfig | None = None,
        *,
        backend: Backend | None = None,
        seed_prompts: SeedPrompts | None = None,
    ) -> None:
        self.args = args if args is not None else SynthesisConfig()
        if not self.args.default_system_prompt:
            processing_class = with_cartridge_chat_template(processing_class)
        teacher = model if model is not None else getattr(backend, "model", None)
        kwargs, thoughts = self.args.chat_template_kwargs, self.args.thoughts
        self.codec = ChatCodec(teacher, processing_class, kwargs, thoughts=thoughts)
        if backend is None:
            if model is None:
                raise ValueError("`model` is missing: pass a causal LM, or a `backend` that has one.")
            batch_size, refill = self.args.generation_batch_size, self.args.refill_finished_rows
            backend = TransformersBackend(model, self.codec, batch_size=batch_size, refill=refill)
        if self.args.teacher_targets not in backend.target_kinds:
            raise ValueError(
                f"`teacher_targets` is {self.args.teacher_targets!r}, but {type(backend).__name__} gives "
                f"{', '.join(backend.target_kinds)} only: set `teacher_targets={backend.target_kinds[0]!r}`."
            )
        self.backend: Backend = backend
        self.seed_prompts: SeedPrompts | None = seed_prompts or self.args.seed_prompts or None

    def synthesize(
        self, corpus: Any, output_dir: str | Path | None = None, *, corpus_name: str | None = None
    ) -> Dataset:
        """The data set of a corpus.

        Args:
            corpus: A text, several texts, or rows with a `text` column; see `as_documents` (and `load_corpus` for
                files, folders and data sets by name).
            output_dir: Where finished chunks are kept. A run that was killed is carried on by the same call, and
                processes that accelerate launched share the chunks. Without it all is in memory, and each process
                makes the whole data set.
            corpus_name: Stands in the data set's description.

        Returns:
            Rows with `messages`, `input_ids` (what the student sees behind its cartridge), `completion_mask` (1 where a
            token is learned), the teacher's targets (`teacher_hidden_states`, flat `[learned tokens * hidden_size]`;
            or `teacher_top_k_ids` and `teacher_top_k_logprobs`, flat `[learned tokens * k]`), `chunk_id`, `context`
            (the text in the teacher's context), `seed_type`, and `usefulness` where that is measured. Its
            `info.description` is JSON: what it was made from and what came of it; see `read_report`.

        Raises:
            ValueError: the corpus is empty or has no `text`, a chunk does not fit into the model's window, nothing was
                kept, or `output_dir` holds another run.
            BackendError: the back end failed for good; finished chunks are kept in `output_dir`.
        """
        documents = as_documents(corpus)
        chunker = self._chunker(documents)
        identity = run_identity(
            self.backend,
            self.codec,
            self.args,
            documents,
            corpus_name=corpus_name or _dataset_name(corpus),
            seed_prompts=self.seed_prompts,
        )
        plan = self._plan(chunker)
        processes = Processes()
        features = make_features(self.args)
        shards: Shards | ShardsInMemory
        if output_dir is None:
            shards, mine = ShardsInMemory(features), list(range(len(plan)))
        else:
            if processes.is_main:
                claim_folder(Path(output_dir), identity)
            processes.wait_for_all()
            if not processes.is_main:
                claim_folder(Path(output_dir), identity)
            shards, mine = Shards(output_dir, features), processes.share(range(len(plan)))
        self._work(plan, mine, shards, shown=processes.is_main)
        processes.wait_for_all()
        dataset, report = self._assemble(shards, len(plan), chunker.lengths)
        description = {**identity, "report": report}
        if output_dir is not None and processes.is_main:
            shards.remove_leftovers()
            write_run_file(Path(output_dir), description)
        if not len(dataset):
            raise ValueError(
                f"No conversation of {report['made']} was kept ({report['dropped']}): loosen `quality_filters`, "
                "`min_usefulness`, `max_question_tokens` or `max_answer_tokens`, or use a stronger model."
            )
        dataset.info.description = json.dumps(description, ensure_ascii=False)
        return dataset

    def preview(self, corpus: Any, number: int = 4) -> tuple[Dataset, float]:
        """A few conversations from all over a corpus, with the run's settings; and the tokens that were generated per
        second meanwhile. The first ones of a run with the same seed are not the same: a preview spreads over more
        chunks."""
        chunker = self._chunker(as_documents(corpus))
        chunks = list(itertools.islice(chunker.chunks(self.args.seed), min(number, 4)))
        plan = [(chunk, number // len(chunks) + (i < number % len(chunks))) for i, chunk in enumerate(chunks)]
        shards = ShardsInMemory(make_features(self.args))
        progress = self._work(plan, list(range(len(plan))), shards, shown=False)
        return self._assemble(shards, len(plan), chunker.lengths)[0], progress.tokens_per_second

    def _chunker(self, documents: list[Document]) -> Chunker:
        args = self.args
        chunker = Chunker(
            documents,
            self.codec,
            min_tokens=args.min_chunk_tokens,
            max_tokens=args.max_chunk_tokens,
            mode=args.chunking,
        )
        longest = min(args.max_chunk_tokens, max(chunker.lengths.values()))
        needed = longest + args.num_rounds * max(args.max_question_tokens, args.max_answer_tokens)
        window = self.backend.max_length
        if window is not None and needed > window:
            raise ValueError(
                f"A chunk of {longest} tokens and its conversation need at least {needed} tokens, the model's window "
                f"has {window}: lower `max_chunk_tokens` ({args.max_chunk_tokens})."
            )
        return chunker

    def _plan(self, chunker: Chunker) -> list[tuple[Chunk, int]]:
        """All chunks of the run, each with the conversations that are wanted about it."""
        total, each = self.args.num_conversations, self.args.conversations_per_chunk
        number = -(-total // each)
        chunks = itertools.islice(chunker.chunks(self.args.seed), number)
        return [(chunk, min(each, total - index * each)) for index, chunk in enumerate(chunks)]

    def _work(
        self, plan: list[tuple[Chunk, int]], mine: list[int], shards: Shards | ShardsInMemory, *, shown: bool
    ) -> Progress:
        """Studies the chunks that are not done; each draws from its own seed, whoever does it and when."""
        study = ChunkStudy(self.backend, self.codec, self.args, self.seed_prompts)
        done = shards.done()
        pending = [number for number in mine if number not in done]
        wanted = sum(plan[number][1] for number in mine)
        left = sum(plan[number][1] for number in pending)
        progress = Progress(wanted, wanted - left, shown=shown)
        if not pending:
            progress.bar.close()
            return progress
        with progress, self.backend.running():
            for number in pending:
                chunk, count = plan[number]
                rows, report = study.study(chunk, count, random.Random(f"{self.args.seed}/{number}"))
                shards.write(number, rows, report)
                progress.add(report, count)
        return progress

    def _assemble(
        self, shards: Shards | ShardsInMemory, number: int, lengths: dict[str, int]
    ) -> tuple[Dataset, dict[str, Any]]:
        """All chunks in order, without what two chunks have alike, and the report."""
        if missing := sorted(set(range(number)) - shards.done()):
            raise ValueError(f"{len(missing)} of {number} chunks are missing, the first is number {missing[0]}.")
        parts, reports = zip(*(shards.read(index) for index in range(number)), strict=True)
        dataset = concatenate_datasets(list(parts))
        reasons = self._compare_chunks(dataset)
        lost: list[Counter[str]] = [Counter() for _ in parts]
        chunk_of_row = (index for index, part in enumerate(parts) for _ in range(len(part)))
        for index, reason in zip(chunk_of_row, reasons, strict=True):
            if reason is not None:
                lost[index][reason] += 1
        if any(lost):
            dataset = dataset.select([row for row, reason in enumerate(reasons) if reason is None])
        return dataset, make_report([r.without(dropped) for r, dropped in zip(reports, lost, strict=True)], lengths)

    def _compare_chunks(self, dataset: Dataset) -> list[str | None]:
        """For each row the filter that drops it because another chunk has its like, or `None`."""
        filters = make_filters(self.args.quality_filters, max_similarity=self.args.max_similarity)
        comparing = {name: one for name, one in filters.items() if one.compares}
        if not comparing:
            return [None] * len(dataset)
        return [
            next((name for name, one in comparing.items() if one.drops(candidate)), None)
            for row in dataset.select_columns(["messages", "context", "seed_type"])
            for candidate in [Candidate(row["messages"], row["context"], row["seed_type"])]
        ]


def _dataset_name(corpus: Any) -> str | None:
    return getattr(getattr(corpus, "info", None), "dataset_name", None)
