"""`cartridges pull REPO`."""

from __future__ import annotations

import argparse

from ..adapter_folder import read_config
from ..hub import load_facts, pull_cartridge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo_id", metavar="repo", help="the cartridge's name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--output-dir", help="copy the files here (default: leave them in the Hub's cache)")
    parser.add_argument("--cache-dir", help="cache to use instead of the Hub's usual one")
    parser.add_argument("--local-files-only", action="store_true", help="do not ask the Hub, only the cache")
    parser.add_argument("--force-download", action="store_true", help="fetch what is in the cache again")


def run(args: argparse.Namespace) -> None:
    folder = pull_cartridge(
        args.repo_id,
        revision=args.revision,
        output_dir=args.output_dir,
        cache_dir=args.cache_dir,
        local_files_only=args.local_files_only,
        force_download=args.force_download,
    )
    config, facts = read_config(folder), load_facts(folder)
    print(f"{args.repo_id}: {config.num_tokens:,} tokens for {facts.base_model or config.base_model_name_or_path}")
    print(folder)
