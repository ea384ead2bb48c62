"""`cartridges evaluate CARTRIDGE --corpus … --questions …`: what a cartridge is worth, on its text and off it."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from transformers import AutoTokenizer

from ..evaluation.baselines import BASELINES
from ..evaluation.config import EvaluationConfig
from ..evaluation.documents import read_json_lines
from ..evaluation.evaluate import DEFAULT_BASELINES, evaluate_cartridge
from ..evaluation.instructions import make_instructions
from ..evaluation.judge import Judge
from ..evaluation.report import EvaluationReport, pyplot
from ..evaluation.tasks import TASKS, general_choices, general_pairs, instruction_rows, load_task, unanswerable_from
from ..gate import load_gate
from ..hub import load_cartridge
from ..hub.pull import find_cartridge
from ..self_study.processes import partial_state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cartridge", help="a folder, or a name on the Hub (user/name[@revision])")
    parser.add_argument("--base-model", help="name or folder of the base model, instead of the one the cartridge names")
    parser.add_argument("--dtype", default="auto", help="of the base model, e.g. bfloat16")
    parser.add_argument(
        "--gate", choices=("auto", "off"), default="auto", help="auto: also measured behind its gate, if it has one"
    )
    parser.add_argument("--device", help="e.g. cuda:1; by default the accelerator if there is one, else the CPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures there as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the gap closed against the size, e.g. gap.png")
    parser.add_argument(
        "--card", action="store_true", help="add the figures to the card in the cartridge's folder (a local one)"
    )

    text = parser.add_argument_group("the text and the questions on it")
    text.add_argument("--corpus", nargs="+", metavar="FILE", help="the text that the cartridge stands in for")
    text.add_argument("--questions", metavar="FILE", help="JSON lines of `question` and `answer`, or with `options`")
    text.add_argument("--task", choices=list(TASKS), help="instead of both: a task, with --document")
    text.add_argument("--data", metavar="FILE", help="the task's rows from a file instead of the Hub")
    text.add_argument("--document", help="id of the task's document (default: the first)")
    text.add_argument("--unanswerable", metavar="FILE", help="JSON lines of `question`s that the text does not answer")
    text.add_argument("--conversations", metavar="FOLDER", help="held-out self-study conversations (`save_to_disk`)")

    off = parser.add_argument_group("off the text (a FILE, `none`, or the named data set of the Hub)")
    off.add_argument("--general", default="self_instruct", metavar="FILE", help="prompts with answers")
    off.add_argument("--general-choices", default="none", metavar="FILE", help="multiple choice, e.g. mmlu")
    off.add_argument(
        "--instructions", default="plain", metavar="FILE", help="ifeval, or plain: one rule for each general prompt"
    )

    beside = parser.add_argument_group("what it is measured beside")
    beside.add_argument(
        "--baselines", nargs="*", default=list(DEFAULT_BASELINES), metavar="NAME",
        help=f"all, or any of: {', '.join(BASELINES)}",
    )  # fmt: skip
    beside.add_argument(
        "--encoder", help="SentenceTransformer of the dense retriever (default: the model's own averaged states)"
    )
    beside.add_argument("--kvpress-python", metavar="FILE", help="interpreter of an environment with kvpress")
    beside.add_argument("--train-conversations", metavar="FOLDER", help="what LoRA is trained on (`save_to_disk`)")
    beside.add_argument("--judge-url", help="an OpenAI-compatible server that grades answers")
    beside.add_argument("--judge-model", help="its model")

    settings = parser.add_argument_group("how much is measured")
    hints = get_type_hints(EvaluationConfig)
    for setting in fields(EvaluationConfig):
        kind: Any = hints[setting.name]
        options: dict[str, Any] = {"help": setting.metadata["help"], "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_args(kind):
            options |= {"nargs": "*", "type": get_args(kind)[0]}
        else:
            options["type"] = kind
        settings.add_argument(f"--{setting.name.replace('_', '-')}", **options)


def run(args: argparse.Namespace) -> None:
    try:
        _run(args)
    except ImportError as error:  # of a metric, a judge or a plot, with what to install
        raise ValueError(str(error)) from error


def _run(args: argparse.Namespace) -> None:
    # What would only fail behind hours of measuring.
    if args.plot:
        pyplot()
    if args.card and not Path(args.cartridge).is_dir():
        raise ValueError("--card writes into a folder: pull the cartridge first (`cartridges pull`).")
    names = [field.name for field in fields(EvaluationConfig)]
    config = EvaluationConfig(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    text, questions, unanswerable = _text(args)
    general = None if args.general == "none" else general_pairs(_file(args.general, "self_instruct")) or None
    choices = [] if args.general_choices == "none" else general_choices(_file(args.general_choices, "mmlu"))
    if args.instructions == "plain":
        instructions: list[Any] = make_instructions([pair["prompt"] for pair in general or ()])
    else:
        instructions = [] if args.instructions == "none" else instruction_rows(_file(args.instructions, "ifeval"))
    if bool(args.judge_url) != bool(args.judge_model):
        raise ValueError("--judge-url and --judge-model go together.")
    judge = Judge(args.judge_url, args.judge_model) if args.judge_url else None
    bench: dict[str, Any] = {"encoder": args.encoder, "kvpress_python": args.kvpress_python}
    if args.train_conversations:
        bench["conversations"] = _conversations(args.train_conversations)
    name, _, revision = args.cartridge.partition("@")
    model, tokenizer = load_cartridge(name, revision=revision or None, base_model=args.base_model, dtype=args.dtype)
    base: Any = model.get_base_model()
    base_tokenizer = AutoTokenizer.from_pretrained(base.config._name_or_path)
    report = evaluate_cartridge(
        model.to(args.device or partial_state().device), tokenizer, text=text, questions=questions, general=general or (),
        general_choices=choices, instructions=instructions, unanswerable=unanswerable,
        conversations=_conversations(args.conversations) if args.conversations else None,
        baselines=list(BASELINES) if args.baselines == ["all"] else args.baselines, bench=bench, base_processing_class=base_tokenizer, judge=judge,
        gate=load_gate(find_cartridge(name, revision=revision or None)) if args.gate == "auto" else None,
        args=config, command=shlex.join(["cartridges", *sys.argv[1:]]), progress=lambda name: print(name, file=sys.stderr),
    )  # fmt: skip
    print(report.table())
    if args.output:
        report.save(args.output)
        print(f"\nWritten to {args.output}")
    if args.plot:
        report.plot(args.plot)
        print(f"Plotted in {args.plot}")
    if args.card:
        _add_to_card(report, args)


def _text(args: argparse.Namespace) -> tuple[str, Any, list[Any]]:
    unanswerable: list[Any] = []
    questions: list[Any]
    if args.task:
        documents = load_task(args.task, args.data)
        chosen = [d for d in documents if args.document in (None, d.id)]
        if not chosen:
            raise ValueError(
                f"--document: the task has no {args.document!r}, but {', '.join(d.id for d in documents[:8])}."
            )
        text, questions = chosen[0].text, [q for q in chosen[0].questions if q.answers]
        unanswerable = [q for q in chosen[0].questions if not q.answers] or unanswerable_from(documents, chosen[0])
    elif args.corpus and args.questions:
        text = "\n\n".join(Path(file).read_text(encoding="utf-8") for file in args.corpus)
        questions = read_json_lines(args.questions)
    else:
        raise ValueError("give --corpus and --questions, or --task.")
    if args.unanswerable:
        unanswerable = read_json_lines(args.unanswerable)
    return text, questions, unanswerable


def _file(given: str, name: str) -> str | None:
    """`None` stands for the data set of the Hub."""
    return None if given == name else given


def _conversations(folder: str) -> Any:
    from datasets import load_from_disk

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder {folder!r}.")
    return load_from_disk(folder)


def _add_to_card(report: EvaluationReport, args: argparse.Namespace) -> None:
    from ..hub.card_facts import load_facts
    from ..hub.model_card import write_model_card

    folder = Path(args.cartridge)
    facts = load_facts(folder)
    new = report.card_metrics(f"questions on the text ({args.task or Path(args.questions).name})")
    kept = [metric for metric in facts.metrics if metric.name not in {entry.name for entry in new}]
    facts.metrics = [*kept, *new]
    print(f"The card: {write_model_card(facts, folder)}")
