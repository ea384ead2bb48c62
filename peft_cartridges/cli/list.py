"""`cartridges list`."""

from __future__ import annotations

import argparse

from ..hub import list_cartridges


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-model", help="only those for this base model (its name on the Hub)")
    parser.add_argument("--search", help="only those with these words in their names")
    parser.add_argument("--author", help="only those of this user or organization")
    parser.add_argument("--tag", action="append", default=[], help="only those with this tag; may be repeated")
    parser.add_argument("--limit", type=int, default=50, help="at most so many (default: 50)")


def run(args: argparse.Namespace) -> None:
    found = list_cartridges(
        base_model=args.base_model, search=args.search, author=args.author, tags=args.tag, limit=args.limit
    )
    number = 0
    for number, model in enumerate(found, start=1):  # noqa: B007
        bases = [tag.rpartition(":")[2] for tag in model.tags or [] if tag.startswith("base_model:adapter:")]
        print(f"{model.id:50} {(bases or ['?'])[0]:40} {model.downloads or 0:>9,} downloads")
    if not number:
        print("No cartridges found.")
