"""From a corpus to what is trained on: an initialized cartridge, and conversations that survive a killed run."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel

from ..chat import ChatCodec
from ..initialization import initialize_cartridge
from ..self_study import SelfStudySynthesizer, SynthesisConfig
from ..self_study.chunking import as_documents
from ..self_study.run_identity import run_identity, synthesis_arguments
from .conversation_stream import ConversationStream
from .self_study_config import SelfStudyConfig

# Trainer's pushes to the Hub leave out what begins with an underscore: the conversations hold the corpus's text.
CONVERSATIONS_DIR = "_conversations"


@dataclass
class Corpus:
    """What a trainer knows of its corpus.

    Args:
        text: All of it, `None` if it is not known.
        dataset: The conversations, if they were made from it here.
        identity: What they were made from, as `run_identity` gives it.
        hub_datasets: Names of the data sets on the Hub that it comes from.
    """

    text: str | None = None
    dataset: Dataset | ConversationStream | None = None
    identity: dict[str, Any] | None = None
    hub_datasets: list[str] = field(default_factory=list)


def make_codec(model: PeftModel, processing_class: Any, args: SynthesisConfig) -> ChatCodec:
    """The codec that the synthesis uses."""
    return ChatCodec(model, processing_class, args.chat_template_kwargs, thoughts=args.thoughts)


def prepare_corpus(
    model: PeftModel, args: SelfStudyConfig, dataset: Dataset, processing_class: Any, *, initialize: bool
) -> Corpus:
    """Synthesizes a corpus (a data set with a column `text`), or prepares to do so round by round (`resample_every`).

    Conversations are kept in `output_dir/_conversations/`, in a folder for each set of settings, so that the same call
    takes up what a killed run has finished. The processes of a distributed run share the work.

    Args:
        model: The PEFT model; its cartridge is disabled meanwhile.
        args: Settings.
        dataset: The corpus.
        processing_class: Tokenizer or processor.
        initialize: Whether to initialize the cartridge.

    Raises:
        ValueError: as `SelfStudySynthesizer.synthesize` and `initialize_cartridge`.
    """
    documents = as_documents(dataset)
    text = "\n\n".join(document.text for document in documents)
    if initialize and args.initialization != "none":
        initialize_cartridge(model, make_codec(model, processing_class, args), text=text, strategy=args.initialization)
    settings = SynthesisConfig(**synthesis_arguments(args))
    synthesizer = SelfStudySynthesizer(model, processing_class, settings)
    name = getattr(dataset.info, "dataset_name", None)
    identity = run_identity(synthesizer.backend, synthesizer.codec, settings, documents, corpus_name=name)
    if args.resample_every:
        return Corpus(text, _stream(model, args, documents, processing_class), identity)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]
    folder = Path(args.output_dir or ".") / CONVERSATIONS_DIR / key
    return Corpus(text, synthesizer.synthesize(documents, output_dir=folder, corpus_name=name), identity)


def find_hub_datasets(dataset: Any) -> list[str]:
    """Names on the Hub of what `load_dataset` made a data set from; empty for others."""
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = [re.match(r"hf://datasets/([^@]+)@", str(source)) for source in sources]
    return list(dict.fromkeys(match[1] for match in found if match))


def _stream(model: PeftModel, args: SelfStudyConfig, documents: list[Any], processing_class: Any) -> ConversationStream:
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = args.resample_every * per_step

    def synthesize(number: int) -> Dataset:
        changes = {"num_conversations": rows, "seed": args.seed + 1_000_003 * number}
        settings = SynthesisConfig(**{**synthesis_arguments(args), **changes})
        return SelfStudySynthesizer(model, processing_class, settings).synthesize(documents)

    return ConversationStream(synthesize, rows, -(-args.max_steps // args.resample_every))
