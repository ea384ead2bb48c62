"""`cartridges quantize FOLDER --to int8 --output-dir FOLDER`."""

from __future__ import annotations

import argparse

from ..adapter_folder import quantize_cartridge
from ..tuner.quantization import SCHEMES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cartridge", help="its folder")
    parser.add_argument(
        "--to",
        choices=(*SCHEMES, "none"),
        default="int8",
        help="how keys and values are kept; `none`: stock PEFT's format, in bfloat16 (default: int8)",
    )
    parser.add_argument("--output-dir", required=True, help="where the smaller cartridge goes")


def run(args: argparse.Namespace) -> None:
    before, after = quantize_cartridge(args.cartridge, args.output_dir, args.to)
    print(f"{before:,} bytes became {after:,} ({after / before:.0%}) in {args.output_dir}")
