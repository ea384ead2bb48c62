"""What a trainer knows of its corpus, and what it makes of it when training starts: a first cartridge, conversations."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel

from ..chat import get_tokenizer
from ..conversations import ConversationFolder, read_provenance
from ..conversations.folder import WRITTEN
from ..corpus import as_documents
from ..self_study import Engine, SelfStudySynthesizer, SynthesisConfig
from ..self_study.sizes import default_conversations
from .data_checks import ROWS_OF_A_STREAM, first_rows
from .rounds import ConversationRounds, size_of_rounds
from .self_study_config import SelfStudyConfig

# Trainer's pushes to the Hub leave out what begins with an underscore: the conversations hold the corpus's text.
CONVERSATIONS_DIR = "_conversations"


class CorpusStudy:
    """A corpus that conversations are written about.

    Args:
        dataset: The corpus, a data set with a column `text`.
        args: Settings.
        processing_class: Tokenizer or processor, with the model's own chat template.
        off_context_dataset: General conversations, instead of those that `args` names.

    Raises:
        ValueError: a document is empty or has no `text`.
    """

    def __init__(
        self, dataset: Any, args: SelfStudyConfig, processing_class: Any, off_context_dataset: Any = None
    ) -> None:
        self.documents = as_documents(dataset)
        self.text = "\n\n".join(document.text for document in self.documents)
        self.name = getattr(getattr(dataset, "info", None), "dataset_name", None)
        self.args = args
        self.processing_class = processing_class
        self._off_context_dataset = off_context_dataset
        self.identity: dict[str, Any] | None = None
        self.decided_by: dict[str, Any] = {}  # what decides the conversations, once they are checked or written
        self._engines: list[Engine] | None = None
        self._round: Path | None = None

    @property
    def is_written(self) -> bool:
        return self.identity is not None

    def check(self, model: PeftModel) -> None:
        """Whether conversations can be written, before anything is run.

        Raises:
            ValueError: as `SelfStudySynthesizer.check`.
        """
        synthesizer, folder = self._prepare(model)
        synthesizer.check(self.documents, folder)

    def write(self, model: PeftModel) -> Dataset | ConversationRounds:
        """The conversations, or rounds of them (`resample_every`).

        They are kept in `output_dir/_conversations/`, so that the same call takes up what a killed run has finished. The
        processes of a distributed run share the work.

        Args:
            model: The PEFT model; its cartridge is disabled meanwhile.

        Raises:
            ValueError: as `SelfStudySynthesizer.synthesize`.
        """
        synthesizer, folder = self._prepare(model)
        if self.args.resample_every:
            return self._rounds(model, folder)
        dataset = synthesizer.synthesize(self.documents, output_dir=folder, corpus_name=self.name)
        self.identity = read_provenance(dataset)
        self._engines = None  # nothing is written any more
        return dataset

    def drop_round(self) -> None:
        """Takes away the round that was written last (`resample_every`): it has been used."""
        if self.args.should_save and self._round is not None:
            shutil.rmtree(self._round, ignore_errors=True)

    def write_held_out(self, model: PeftModel) -> Dataset:
        """Conversations to evaluate on: other questions than `write` gives, and no recitations, which any cartridge that
        began as a part of the text does well on."""
        settings = SynthesisConfig.from_args(
            self.args,
            num_conversations=self.args.num_eval_conversations,
            synthesis_seed=self.args.synthesis_seed + 1,
            recitation_share=0.0,
            off_context_share=0.0,
        )
        return self._write(model, settings)

    def measure(self, model: PeftModel, number: int) -> tuple[float, Dataset]:
        """Seconds that a conversation takes to be written and scored, and the first `number` of the set, which are kept."""
        settings = SynthesisConfig.from_args(self.args, num_conversations=number)
        there = ConversationFolder(self._folder / self.address(model)[:12]).parts(WRITTEN)
        start = time.perf_counter()
        if there:  # what it took to make them is not known any more
            self._synthesizer(model, settings).preview(self.documents, number)
            seconds = time.perf_counter() - start
            return seconds / number, self._write(model, settings)
        dataset = self._write(model, settings)
        return (time.perf_counter() - start) / number, dataset

    def address(self, model: PeftModel) -> str:
        """Of the set of this corpus, whatever its size."""
        return self._synthesizer(model, SynthesisConfig.from_args(self.args)).address(self.documents)

    @cached_property
    def num_tokens(self) -> int:
        """Length of the corpus."""
        tokenizer = get_tokenizer(self.processing_class)
        ids = tokenizer([document.text for document in self.documents], add_special_tokens=False, verbose=False)
        return sum(map(len, ids["input_ids"]))

    @property
    def default_conversations(self) -> int:
        """How many conversations there are to be about the corpus where nothing is said."""
        return default_conversations(self.num_tokens)

    def _write(self, model: PeftModel, settings: SynthesisConfig) -> Dataset:
        synthesizer = self._synthesizer(model, settings)
        folder = self._folder / synthesizer.address(self.documents)[:12]
        return synthesizer.synthesize(self.documents, output_dir=folder, corpus_name=self.name)

    def _prepare(self, model: PeftModel) -> tuple[SelfStudySynthesizer, Path]:
        synthesizer = self._synthesizer(model, SynthesisConfig.from_args(self.args))
        wanted = synthesizer.identity(self.documents)
        self.decided_by = wanted["decided_by"]
        return synthesizer, self._folder / wanted["address"][:12]

    def _synthesizer(self, model: PeftModel, settings: SynthesisConfig) -> SelfStudySynthesizer:
        """One that writes by the same engines as those before it: vLLM in this process loads a model for itself."""
        synthesizer = SelfStudySynthesizer(
            model,
            self.processing_class,
            settings,
            engines=self._engines,
            off_context_dataset=self._off_context_dataset,
        )
        if settings.engine != "transformers":  # that one is the model at hand, and holds the chunks that it has read
            self._engines = synthesizer.engines
        return synthesizer

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir or ".") / CONVERSATIONS_DIR

    def _rounds(self, model: PeftModel, folder: Path) -> ConversationRounds:
        args = self.args
        rows, general, number_of_rounds = size_of_rounds(args)
        self.identity = {}

        def synthesize(number: int) -> Dataset:
            settings = SynthesisConfig.from_args(
                args, num_conversations=rows - general, synthesis_seed=args.synthesis_seed + 1_000_003 * number
            )
            self.drop_round()
            synthesizer = self._synthesizer(model, settings)
            self._round = folder.with_name(f"{folder.name}-round-{number}")
            dataset = synthesizer.synthesize(self.documents, output_dir=self._round, corpus_name=self.name)
            self.identity = read_provenance(dataset)
            return dataset

        return ConversationRounds(synthesize, rows, number_of_rounds, general)


def text_of_contexts(dataset: Any) -> str | None:
    """The texts that conversations are about, in the order of their first appearance (of a data set that comes row by
    row: of its first rows); `None` if it does not say."""
    contexts: Iterable[str | None]
    if isinstance(dataset, Dataset):
        if "context" not in dataset.column_names:
            return None
        contexts = dataset.select_columns(["context"]).with_format("arrow")[:]["context"].unique().to_pylist()
    else:
        contexts = dict.fromkeys(row.get("context") for row in first_rows(dataset, ROWS_OF_A_STREAM))
    return "\n\n".join(filter(None, contexts)) or None


def count_tokens(study: CorpusStudy | None, corpus: str | None, dataset: Any, processing_class: Any) -> int | None:
    """Length of the text that a cartridge stands in for: of the corpus, where it is known, or as the conversations say;
    `None` where nobody knows."""
    if study is not None:
        return study.num_tokens
    if corpus is not None:
        ids = get_tokenizer(processing_class)(corpus, add_special_tokens=False, verbose=False)
        return len(ids["input_ids"])
    coverage = (read_provenance(dataset).get("report") or {}).get("coverage") or {}
    return sum(document["num_tokens"] for document in coverage.values()) or None


def find_hub_datasets(dataset: Any) -> list[str]:
    """Names on the Hub of what `load_dataset` made a data set from; empty for others."""
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = [re.match(r"hf://datasets/([^@]+)@", str(source)) for source in sources]
    return list(dict.fromkeys(match[1] for match in found if match))
