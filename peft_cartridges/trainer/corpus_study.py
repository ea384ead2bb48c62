"""What a trainer knows of its corpus, and what it makes of it when training starts: a first cartridge, conversations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel

from ..self_study import SelfStudySynthesizer, SynthesisConfig
from ..self_study.chat_template_arguments import WithTemplateArguments, parse_template_arguments
from ..self_study.chunking import as_documents
from ..self_study.run_identity import run_identity, synthesis_arguments
from .data_checks import first_rows
from .rounds import ConversationRounds
from .self_study_config import SelfStudyConfig

# Trainer's pushes to the Hub leave out what begins with an underscore: the conversations hold the corpus's text.
CONVERSATIONS_DIR = "_conversations"
_ROWS_OF_A_STREAM = 256


class CorpusStudy:
    """A corpus that conversations are written about.

    Args:
        dataset: The corpus, a data set with a column `text`.
        args: Settings.
        processing_class: Tokenizer or processor.

    Raises:
        ValueError: a document is empty or has no `text`.
    """

    def __init__(self, dataset: Any, args: SelfStudyConfig, processing_class: Any) -> None:
        self.documents = as_documents(dataset)
        self.text = "\n\n".join(document.text for document in self.documents)
        self.name = getattr(getattr(dataset, "info", None), "dataset_name", None)
        self.args = args
        self.processing_class = processing_class
        self.identity: dict[str, Any] | None = None

    @property
    def is_written(self) -> bool:
        return self.identity is not None

    def write(self, model: PeftModel) -> Dataset | ConversationRounds:
        """The conversations, or rounds of them (`resample_every`).

        They are kept in `output_dir/_conversations/`, so that the same call takes up what a killed run has finished. The
        processes of a distributed run share the work.

        Args:
            model: The PEFT model; its cartridge is disabled meanwhile.

        Raises:
            ValueError: as `SelfStudySynthesizer.synthesize`.
        """
        settings = SynthesisConfig(**synthesis_arguments(self.args))
        synthesizer = SelfStudySynthesizer(model, self.processing_class, settings)
        self.identity = run_identity(
            synthesizer.backend, synthesizer.processing_class, settings, self.documents, corpus_name=self.name
        )
        if self.args.resample_every:
            return self._rounds(model, settings)
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return synthesizer.synthesize(self.documents, output_dir=self._folder / key, corpus_name=self.name)

    @property
    def _folder(self) -> Path:
        return Path(self.args.output_dir or ".") / CONVERSATIONS_DIR

    def _rounds(self, model: PeftModel, settings: SynthesisConfig) -> ConversationRounds:
        args = self.args
        rows = args.resample_every * args.train_batch_size * args.gradient_accumulation_steps * args.world_size

        def synthesize(number: int) -> Dataset:
            of_round = dataclasses.replace(
                settings, num_conversations=rows, seed=settings.seed + 1_000_003 * number
            )
            synthesizer = SelfStudySynthesizer(model, self.processing_class, of_round)
            if args.should_save and number:  # the round before has been used
                shutil.rmtree(self._folder / f"round-{number - 1}", ignore_errors=True)
            return synthesizer.synthesize(self.documents, output_dir=self._folder / f"round-{number}")

        return ConversationRounds(synthesize, rows, -(-args.max_steps // args.resample_every))


def with_template_arguments(processing_class: Any, args: SynthesisConfig) -> Any:
    """The tokenizer with the further arguments of the chat template that the synthesis uses."""
    arguments = parse_template_arguments(args.chat_template_kwargs)
    return WithTemplateArguments(processing_class, arguments) if arguments else processing_class


def text_of_contexts(dataset: Any) -> str | None:
    """The texts that conversations are about, in the order of their first appearance (of a data set that comes row by
    row: of its first rows); `None` if it does not say."""
    contexts: Iterable[str | None]
    if isinstance(dataset, Dataset):
        if "context" not in dataset.column_names:
            return None
        contexts = dataset.select_columns(["context"]).with_format("arrow")[:]["context"].unique().to_pylist()
    else:
        contexts = dict.fromkeys(row.get("context") for row in first_rows(dataset, _ROWS_OF_A_STREAM))
    return "\n\n".join(filter(None, contexts)) or None


def find_hub_datasets(dataset: Any) -> list[str]:
    """Names on the Hub of what `load_dataset` made a data set from; empty for others."""
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = [re.match(r"hf://datasets/([^@]+)@", str(source)) for source in sources]
    return list(dict.fromkeys(match[1] for match in found if match))
