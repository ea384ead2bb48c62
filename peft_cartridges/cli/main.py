"""`cartridges COMMAND …`: each command is a module with `add_arguments(parser)` and `run(args)`, imported when asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__

# Command -> (module beside this one, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "compose": ("compose", "Join several cartridges into one."),
    "list": ("list", "List the cartridges on the Hub."),
    "pull": ("pull", "Fetch a cartridge from the Hub and check it."),
    "push": ("push", "Put a cartridge on the Hub, with its card."),
    "quantize": ("quantize", "Write a cartridge anew, in fewer bytes."),
    "synthesize": ("synthesize", "Write the self-study data set of a corpus, or preview it."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; errors that a user can mend are one line on stderr and exit status 1 (usage errors: 2)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="cartridges", description="Small trained KV caches that stand in for long texts."
    )
    parser.add_argument("--version", action="version", version=f"peft-cartridges {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, help_line) in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=help_line)
        if name in argv[:1]:
            importlib.import_module(f".{module_name}", __package__).add_arguments(command)
    args = parser.parse_args(argv)
    module = importlib.import_module(f".{COMMANDS[args.command][0]}", __package__)
    try:
        module.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"cartridges {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("; ".join(filter(None, (f"\ncartridges {args.command}: interrupted", str(stop)))), file=sys.stderr)
        return 130
    return 0
