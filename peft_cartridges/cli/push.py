"""`cartridges push FOLDER REPO`."""

from __future__ import annotations

import argparse

from ..hub import push_cartridge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of a saved cartridge")
    parser.add_argument("repo_id", metavar="repo", help="its name on the Hub, user/name; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
    parser.add_argument("--revision", "--branch", metavar="BRANCH", help="branch to push to; made if it is not there")
    parser.add_argument("--create-pr", action="store_true", help="propose it as a pull request")
    parser.add_argument("--base-model", help="the base model's name on the Hub, if the cartridge knows only a folder")
    parser.add_argument("--include", action="append", default=[], metavar="FILE", help="a further file of the folder")
    parser.add_argument("--message", default="Upload cartridge", help="commit message")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be uploaded")


def run(args: argparse.Namespace) -> None:
    push = push_cartridge(
        args.folder,
        args.repo_id,
        base_model=args.base_model,
        include=args.include,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
        dry_run=args.dry_run,
    )
    print(f"{'Would push' if args.dry_run else 'Pushed'} to {push}")
    if push.url:
        print(push.url)
