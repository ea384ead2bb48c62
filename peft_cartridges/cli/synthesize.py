"""`cartridges synthesize CORPUS --model …`: the conversation set of a corpus."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..conversations import format_conversation, format_report, push_self_study, read_report
from ..corpus import Document, load_corpus
from ..hub.model_card import is_hub_name
from ..self_study import EngineError, SelfStudySynthesizer, SynthesisConfig, estimate_run
from ..self_study.processes import Processes, partial_state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "corpus", nargs="+", help="files, folders, globs, or data sets (hf://datasets/OWNER/NAME[:CONFIG])"
    )
    parser.add_argument("--model", required=True, help="name or path of the model (at a server: its name there)")
    parser.add_argument(
        "--output-dir",
        type=Path,
        help="the set's folder; the same command carries it on, a larger --num-conversations extends it",
    )
    parser.add_argument(
        "--preview", type=int, metavar="N", help="only print N conversations and what the run would take"
    )
    parser.add_argument("--estimate", action="store_true", help="only print tokens and sizes; no model is loaded")
    parser.add_argument("--push-to-hub", metavar="REPO", help="push the set there, with a card; needs --output-dir")
    parser.add_argument("--public", action="store_true", help="everyone may read the pushed set, and your corpus in it")

    corpus = parser.add_argument_group("corpus")
    corpus.add_argument(
        "--description", default="", help="a sentence on the corpus, shown to the model with each chunk"
    )
    corpus.add_argument("--exclude", nargs="*", default=[], metavar="PATTERN", help="paths to leave out")
    corpus.add_argument("--split", default="train", help="split of a data set")
    corpus.add_argument("--text-column", default="text", help="column of a data set")
    corpus.add_argument("--streaming", action="store_true", help="read the corpus as it comes, a document at a time")
    corpus.add_argument("--max-documents", type=int, help="stop after so many")

    model = parser.add_argument_group("model")
    model.add_argument("--tokenizer", help="where the model's tokenizer is, if it is not at --model")
    model.add_argument("--score-with", metavar="MODEL", help="the model's weights here, to score what an engine wrote")
    model.add_argument("--dtype", default="auto", help="of the model's weights, e.g. bfloat16")
    model.add_argument("--device", help="e.g. cuda:1; by default the accelerator if there is one, else the CPU")

    _add_settings(parser.add_argument_group("settings of the synthesis"))


def run(args: argparse.Namespace) -> None:
    settings = _settings(args)
    if args.preview is not None and args.preview < 1:
        raise ValueError(f"--preview shows at least 1 conversation, got {args.preview}.")
    if args.output_dir is None and args.preview is None and not args.estimate:
        raise ValueError("--output-dir is missing (or --preview N, or --estimate): where should the set go?")
    if args.push_to_hub and not is_hub_name(args.push_to_hub):
        raise ValueError(f"--push-to-hub: {args.push_to_hub!r} is no name on the Hub (`user/name`).")
    tokenizer = _load_tokenizer(args)
    if args.estimate or args.preview is not None:
        _look(args, settings, tokenizer)
        return
    synthesizer = _make_synthesizer(args, settings, tokenizer)
    try:
        dataset = synthesizer.synthesize(_load_corpus(args), args.output_dir)
    except EngineError as error:
        raise OSError(str(error)) from error
    except KeyboardInterrupt as stop:
        message = f"what is finished is kept in {args.output_dir}; the same command carries on"
        raise KeyboardInterrupt(message) from stop
    if not Processes().is_main:
        return
    print(format_report(read_report(dataset)))
    print(f"The set is in {args.output_dir}: load_self_study({str(args.output_dir)!r})")
    if args.push_to_hub:
        print(push_self_study(dataset, args.push_to_hub, private=not args.public))


def _look(args: argparse.Namespace, settings: SynthesisConfig, tokenizer: Any) -> None:
    """Prints sizes, and some conversations with the time that the run would take."""
    documents = list(_load_corpus(args))
    chunker = settings.make_chunker(documents, tokenizer)
    estimate = estimate_run(settings, chunker.lengths, hidden_size=_hidden_size(args, settings))
    number = f"{len(documents):,} document{'s' if len(documents) > 1 else ''}"
    print(f"{number}, {sum(chunker.lengths.values()):,} tokens\n{estimate}")
    if args.preview is None:
        return
    try:
        dataset, speed = _make_synthesizer(args, settings, tokenizer).preview(documents, args.preview)
    except EngineError as error:
        raise OSError(str(error)) from error
    for position, row in enumerate(dataset, start=1):
        print(f"\n{format_conversation(row, position)}")
    if speed > 0:
        minutes = estimate.seconds(speed) / 60
        print(f"\n{speed:,.0f} tokens/s here: the run would take at most about {minutes:,.1f} minutes.")


def _load_corpus(args: argparse.Namespace) -> Iterable[Document]:
    return load_corpus(
        args.corpus,
        split=args.split,
        text_column=args.text_column,
        streaming=args.streaming,
        max_documents=args.max_documents,
        description=args.description,
        exclude=args.exclude,
    )


def _make_synthesizer(args: argparse.Namespace, settings: SynthesisConfig, tokenizer: Any) -> SelfStudySynthesizer:
    name = args.model if settings.engine == "transformers" else args.score_with
    if name is None:
        return SelfStudySynthesizer(None, tokenizer, settings)
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype)
    # Of several processes each has a device of its own.
    return SelfStudySynthesizer(model.to(args.device or partial_state().device).eval(), tokenizer, settings)


def _load_tokenizer(args: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    option, name = ("--tokenizer", args.tokenizer) if args.tokenizer else ("--model", args.model)
    if not Path(name).exists() and not is_hub_name(name):
        raise ValueError(f"{option}: {name!r} is neither a folder nor a name on the Hub (`user/name`).")
    return AutoTokenizer.from_pretrained(name)


def _hidden_size(args: argparse.Namespace, settings: SynthesisConfig) -> int | None:
    if settings.teacher_targets != "hidden_states":
        return None
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(args.score_with or args.model).get_text_config().hidden_size


def _add_settings(group: Any) -> None:
    """An option for each setting of `SynthesisConfig`, in kebab case."""
    hints = get_type_hints(SynthesisConfig)
    for field in fields(SynthesisConfig):
        kind: Any = hints[field.name]
        options: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%"), "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float, str):
            options["type"] = kind
        elif int in get_args(kind):
            options["type"] = int
        elif get_args(kind) == (str,):
            options["nargs"] = "*"
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _settings(args: argparse.Namespace) -> SynthesisConfig:
    """The settings that were given. Where no weights are here to score with, nothing is stored unless it is asked for:
    the trainer computes the teacher in its steps."""
    given = {field.name: getattr(args, field.name) for field in fields(SynthesisConfig) if hasattr(args, field.name)}
    if given.get("engine", "transformers") != "transformers":
        given.setdefault("engine_model", args.model)
        if args.score_with is None:
            given.setdefault("teacher_targets", "live")
    return SynthesisConfig(**given)
