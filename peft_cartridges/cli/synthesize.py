"""`cartridges synthesize CORPUS --model …`: the self-study data set of a corpus."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..hub.model_card import is_hub_name
from ..self_study import (
    SelfStudySynthesizer,
    SynthesisConfig,
    estimate_run,
    format_conversation,
    format_report,
    load_corpus,
    push_self_study,
    read_report,
)
from ..self_study.backends import BackendError, OpenAIBackend, VLLMBackend
from ..self_study.chunking import Chunker
from ..self_study.processes import Processes, partial_state

BACKENDS = ("transformers", "vllm", "openai")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "corpus", nargs="+", help="files, folders, globs, or data sets (hf://datasets/OWNER/NAME[:CONFIG])"
    )
    parser.add_argument("--model", required=True, help="name or path of the model (at a server: its name there)")
    parser.add_argument("--output-dir", type=Path, help="where the run is kept; the same command carries it on")
    parser.add_argument(
        "--preview", type=int, metavar="N", help="only print N conversations and what the run would take"
    )
    parser.add_argument("--estimate", action="store_true", help="only print tokens and sizes; no model is loaded")
    parser.add_argument("--push-to-hub", metavar="REPO", help="push the data set there, with a card")
    parser.add_argument("--public", action="store_true", help="make the pushed data set public")

    corpus = parser.add_argument_group("corpus")
    corpus.add_argument(
        "--description", default="", help="a sentence on the corpus, shown to the model with each chunk"
    )
    corpus.add_argument("--exclude", nargs="*", default=[], metavar="PATTERN", help="paths to leave out")
    corpus.add_argument("--split", default="train", help="split of a data set")
    corpus.add_argument("--text-column", default="text", help="column of a data set")
    corpus.add_argument("--streaming", action="store_true", help="read a data set of the Hub as it comes")
    corpus.add_argument("--max-documents", type=int, help="stop after so many")

    backend = parser.add_argument_group("back end")
    backend.add_argument("--backend", choices=BACKENDS, default="transformers", help="what generates")
    backend.add_argument("--tokenizer", help="where the model's tokenizer is, if it is not at --model")
    backend.add_argument("--dtype", default="auto", help="of the model's weights, e.g. bfloat16")
    backend.add_argument("--device", help="e.g. cuda:1; by default the accelerator if there is one, else the CPU")
    backend.add_argument("--base-url", help="of an OpenAI-compatible server, e.g. http://localhost:8000/v1")
    backend.add_argument("--concurrency", type=int, default=16, help="requests to a server at a time")
    backend.add_argument("--max-retries", type=int, default=6, help="how often a request to a server is sent again")
    backend.add_argument("--text-tokens", action="store_true", help="for servers that give no token ids")

    _add_settings(parser.add_argument_group("settings of the synthesis"))


def run(args: argparse.Namespace) -> None:
    documents = load_corpus(
        args.corpus,
        split=args.split,
        text_column=args.text_column,
        streaming=args.streaming,
        max_documents=args.max_documents,
        description=args.description,
        exclude=args.exclude,
    )
    settings = _settings(args)
    if args.output_dir is None and args.preview is None and not args.estimate and args.push_to_hub is None:
        raise ValueError("--output-dir is missing (or --preview N, or --estimate): where should the data set go?")
    tokenizer = _load_tokenizer(args)
    chunker = Chunker(
        documents,
        tokenizer,
        min_tokens=settings.min_chunk_tokens,
        max_tokens=settings.max_chunk_tokens,
        mode=settings.chunking,
    )
    estimate = estimate_run(settings, chunker.lengths, hidden_size=_hidden_size(args, settings))
    number = f"{len(documents):,} document{'s' if len(documents) > 1 else ''}"
    print(f"{number}, {sum(chunker.lengths.values()):,} tokens\n{estimate}")
    if args.estimate and args.preview is None:
        return
    synthesizer = _make_synthesizer(args, settings, tokenizer)
    try:
        if args.preview is not None:
            dataset, speed = synthesizer.preview(documents, args.preview)
            for position, row in enumerate(dataset, start=1):
                print(f"\n{format_conversation(row, position)}")
            if speed > 0:
                minutes = estimate.seconds(speed) / 60
                print(f"\n{speed:,.0f} tokens/s here: the run would take at most about {minutes:,.1f} minutes.")
            return
        dataset = synthesizer.synthesize(documents, args.output_dir)
    except BackendError as error:
        raise OSError(str(error)) from error
    except KeyboardInterrupt as stop:
        if args.preview is not None or args.output_dir is None:
            raise
        message = f"finished conversations are kept in {args.output_dir}; the same command carries on"
        raise KeyboardInterrupt(message) from stop
    if not Processes().is_main:
        return
    print(format_report(read_report(dataset)))
    if args.output_dir is not None:
        print(f"The data set is in {args.output_dir}.")
    if args.push_to_hub:
        print(push_self_study(dataset, args.push_to_hub, private=not args.public))


def _make_synthesizer(args: argparse.Namespace, settings: SynthesisConfig, tokenizer: Any) -> SelfStudySynthesizer:
    if args.backend == "openai":
        if not args.base_url:
            raise ValueError("--base-url is missing: where is the server?")
        server = OpenAIBackend(
            args.base_url,
            args.model,
            tokenizer,
            top_k=settings.teacher_top_k,
            concurrency=args.concurrency,
            max_retries=args.max_retries,
            token_ids=not args.text_tokens,
        )
        return SelfStudySynthesizer(None, tokenizer, settings, backend=server)
    if args.backend == "vllm":
        engine = VLLMBackend(args.model, tokenizer, top_k=settings.teacher_top_k, dtype=args.dtype)
        return SelfStudySynthesizer(None, tokenizer, settings, backend=engine)
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
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

    return AutoConfig.from_pretrained(args.model).get_text_config().hidden_size


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
        elif get_args(kind) == (str,):
            options["nargs"] = "*"
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _settings(args: argparse.Namespace) -> SynthesisConfig:
    """The settings that were given. With an engine, targets are the top k unless something else is said."""
    given = {field.name: getattr(args, field.name) for field in fields(SynthesisConfig) if hasattr(args, field.name)}
    if args.backend != "transformers":
        given.setdefault("teacher_targets", "top_k")
    return SynthesisConfig(**given)
