"""`cartridges COMMAND …`: each command is a module, imported when asked for, with `run(args)` and either
`add_arguments(parser)` or, where it has a parser of its own, `parse_args(argv)`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..quiet import quiet_libraries

# Command -> (module beside this one, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "chat": ("chat", "Talk with a model behind a cartridge, here or on a server."),
    "compose": ("compose", "Join several cartridges into one."),
    "cost": ("cost", "What a cartridge costs to make and to serve, and when it pays."),
    "estimate": ("estimate", "Say what a project takes: disk, memory and time."),
    "evaluate": ("evaluate", "Measure a cartridge on its text and off it, beside what one would do instead."),
    "gate": ("gate", "Make a cartridge's gate, which tells requests about its text from others."),
    "info": ("info", "Tell what a cartridge is, without loading it."),
    "list": ("list", "List the cartridges on the Hub."),
    "pull": ("pull", "Fetch a cartridge from the Hub and check it."),
    "push": ("push", "Put a cartridge on the Hub, with its card."),
    "quantize": ("quantize", "Write a cartridge anew, in fewer bytes."),
    "serve": ("serve", "Serve cartridges by name, with an OpenAI-compatible API."),
    "synthesize": ("synthesize", "Write the self-study data set of a corpus, or preview it."),
    "train": ("train", "Train a cartridge of a text."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; errors that a user can mend are one line on stderr and exit status 1 (usage errors: 2)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="cartridges", description="Small trained KV caches that stand in for long texts."
    )
    parser.add_argument("--version", action="version", version=f"peft-cartridges {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = argv[0] if argv and argv[0] in COMMANDS else None
    module: Any = None
    if chosen is not None:
        quiet_libraries()
        module = importlib.import_module(f".{COMMANDS[chosen][0]}", __package__)
    for name, (_, help_line) in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=help_line)
        if name == chosen and hasattr(module, "add_arguments"):
            module.add_arguments(command)
    try:
        if chosen is not None and hasattr(module, "parse_args"):
            module.run(module.parse_args(argv[1:]))
        else:
            args = parser.parse_args(argv)
            module.run(args)
    except (ValueError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())  # other libraries' have paragraphs
        print(f"cartridges {chosen}: error: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("; ".join(filter(None, (f"\ncartridges {chosen}: interrupted", str(stop)))), file=sys.stderr)
        return 130
    return 0
