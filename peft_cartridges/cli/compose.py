"""`cartridges compose CARTRIDGE CARTRIDGE … --output-dir FOLDER`."""

from __future__ import annotations

import argparse

from ..adapter_folder import read_config
from ..hub import compose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cartridges", nargs="+", help="folders or names on the Hub (user/name@revision), in order")
    parser.add_argument("--output-dir", required=True, help="where the joined cartridge goes")
    parser.add_argument(
        "--sinks",
        choices=("first", "all"),
        default="first",
        help="keep the frozen first tokens of the first cartridge only, or of all (default: first)",
    )
    parser.add_argument("--base-model", help="the base model's name, if the cartridges call it by different ones")


def run(args: argparse.Namespace) -> None:
    folder = compose(args.cartridges, output_dir=args.output_dir, sinks=args.sinks, base_model=args.base_model)
    print(f"{read_config(folder).num_tokens:,} tokens of {len(args.cartridges)} cartridges are in {folder}")
