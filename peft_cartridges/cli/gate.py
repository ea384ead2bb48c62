"""`cartridges gate CARTRIDGE --corpus … | --conversations …`: makes a cartridge's gate, or tries the one it has."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..adapter_folder import read_config
from ..gate import GENERAL_REQUESTS, Gate
from ..hub import load_facts, save_facts, write_model_card
from ..hub.card_facts import gate_facts
from ..hub.model_card import is_edited


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cartridge", type=Path, help="its folder; the gate is saved there as gate.safetensors")
    parser.add_argument("--corpus", nargs="+", metavar="FILE", help="the text that the cartridge stands in for")
    parser.add_argument(
        "--conversations", help="instead: its conversations (a folder or a name on the Hub), which quote it"
    )
    parser.add_argument(
        "--general", type=Path, metavar="FILE",
        help="requests that have nothing to do with the text, which set the threshold: JSON lines of `prompt` (default: "
        f"{len(GENERAL_REQUESTS)} of this package's own)",
    )  # fmt: skip
    parser.add_argument(
        "--reject-general",
        type=float,
        default=0.85,
        help="the share of them that the gate is to reject (default: 0.85)",
    )
    parser.add_argument("--base-model", help="name or folder of the base model, if not the one that the cartridge says")
    parser.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="REQUEST",
        help="say what the gate makes of a request; may be repeated",
    )


def run(args: argparse.Namespace) -> None:
    folder: Path = args.cartridge
    config = read_config(folder)
    if args.corpus and args.conversations:
        raise ValueError("--corpus and --conversations: give one of them.")
    asked: list[str] = []
    if args.corpus or args.conversations:
        text, asked = _text(args)
        base = args.base_model or load_facts(folder).base_model or config.base_model_name_or_path
        if not base:
            raise ValueError(f"{folder} does not say which base model it belongs to: give --base-model.")
        general = GENERAL_REQUESTS if args.general is None else _prompts(args.general)
        tokenizer = AutoTokenizer.from_pretrained(base)
        gate = Gate.make(text, tokenizer, general=general, reject_general=args.reject_general)
        path = gate.save_pretrained(folder)
        _tell_card(folder)
        print(f"The gate is in {path} ({path.stat().st_size:,} bytes).")
    elif args.ask:
        gate = Gate.from_pretrained(folder)
    else:
        raise ValueError("give --corpus or --conversations to make a gate, or --ask to try the one that is there.")
    print(f"Rejected: {gate.general_rejected:.1%} of {gate.num_general:,} requests that are not about the text.")
    if asked:
        print(f"Accepted: {sum(gate(asked)) / len(asked):.1%} of {len(asked):,} questions of the conversations.")
    for request in args.ask:
        verdict = "accepted" if gate.accepts(request) else "rejected"
        print(f"{verdict} ({gate.score(request):+.2f}, the threshold is {gate.threshold:+.2f}): {request}")


def _text(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The text's parts, and the questions asked about it, if there are any."""
    if args.corpus:
        from ..corpus import load_corpus

        return [document.text for document in load_corpus(args.corpus)], []
    from ..conversations import load_self_study

    data: Any = load_self_study(args.conversations, targets="live")
    if "context" not in data.column_names:
        raise ValueError(
            f"--conversations: {args.conversations} does not hold the text that it is about: give --corpus."
        )
    contexts = [context for context in data["context"] if context]
    return contexts, [
        row[0]["content"] for row, context in zip(data["messages"], data["context"], strict=True) if context
    ]


def _prompts(path: Path) -> list[str]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                found.append(json.loads(line)["prompt"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"--general: line {number} of {path} is no JSON object with a `prompt`.") from error
    return found


def _tell_card(folder: Path) -> None:
    """The card says that there is a gate, unless someone edited it."""
    facts = dataclasses.replace(load_facts(folder), gate=gate_facts(folder))
    if is_edited(folder):
        save_facts(facts, folder)
    else:
        write_model_card(facts, folder)
