"""`cartridges serve BASE --cartridge NAME=CARTRIDGE …`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from ..serving.catalog import Sources
from ..serving.settings import ServerSettings

_GIB = 1 << 30
_ADMIN_KEY = "CARTRIDGES_ADMIN_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Other options are the engine's: --port, --dtype, --max-model-len, … as `vllm serve` takes them."
    parser.add_argument("base", help="the base model: its name on the Hub, or its folder")
    parser.add_argument(
        "--cartridge", action="append", default=[], metavar="NAME=CARTRIDGE", dest="cartridges",
        help="a cartridge, and the model name that requests call it by: a folder, or a name on the Hub "
        "(user/name@revision); may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--engine", choices=("vllm", "transformers"), default=None,
        help="what computes (default: vllm where it is installed)",
    )  # fmt: skip
    parser.add_argument(
        "--gate", choices=("auto", "off"), default="auto",
        help="auto: a request that the cartridge's gate rejects is answered by the base model, without the cartridge; a "
        "cartridge without a gate takes all (default: auto)",
    )  # fmt: skip
    group = parser.add_argument_group("memory and limits")
    group.add_argument("--store", type=Path, help="folder for checked copies of the cartridges (default: temporary)")
    group.add_argument(
        "--cartridge-host-gib", type=float, default=4.0, help="host memory for cartridges, a worker (default: 4)"
    )
    group.add_argument("--max-cartridges", type=int, default=1024, help="compositions included (default: 1024)")
    group.add_argument("--max-cartridge-gib", type=float, default=64.0, help="of all cartridges (default: 64)")
    group.add_argument("--cartridge-load-seconds", type=float, default=300.0, help="a load at run time (default: 300)")
    group = parser.add_argument_group("who may do what")
    group.add_argument("--tenants", type=Path, help="JSON file of API keys and the cartridges that each may name")
    group.add_argument(
        "--admin-key-file", type=Path,
        help=f"file with the key for loading and unloading at run time (or ${_ADMIN_KEY}); without one, nobody may",
    )  # fmt: skip
    group.add_argument(
        "--cartridge-root", type=Path, action="append", default=[],
        help="a folder from below which cartridges may be loaded at run time; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--cartridge-namespace", action="append", default=[],
        help="a user or organization of the Hub whose cartridges may be loaded at run time; may be repeated",
    )  # fmt: skip


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """What this command does not know goes to the engine, which knows much more (`engine_arguments`)."""
    parser = argparse.ArgumentParser(prog="cartridges serve", allow_abbrev=False)
    add_arguments(parser)
    args, others = parser.parse_known_args(argv)
    args.engine_arguments = others
    return args


def run(args: argparse.Namespace) -> None:
    settings = ServerSettings(
        base=args.base,
        cartridges=_named(args.cartridges),
        store=args.store,
        host_bytes=int(args.cartridge_host_gib * _GIB),
        max_cartridges=args.max_cartridges,
        max_bytes=int(args.max_cartridge_gib * _GIB),
        load_seconds=args.cartridge_load_seconds,
        sources=Sources(tuple(args.cartridge_root), tuple(args.cartridge_namespace)),
        tenants=args.tenants,
        gate=args.gate == "auto",
        admin_key=_admin_key(args.admin_key_file),
    )
    has_vllm = importlib.util.find_spec("vllm") is not None
    if (args.engine or ("vllm" if has_vllm else "transformers")) == "vllm":
        if not has_vllm:
            raise ValueError(
                "vLLM is not installed here: pip install 'vllm>=0.32', or serve with --engine transformers."
            )
        from ..serving import vllm_server

        vllm_server.run(settings, args.engine_arguments)
    else:
        from ..serving import transformers_server

        transformers_server.run(settings, args.engine_arguments)


def _named(cartridges: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for argument in cartridges:
        name, _, source = argument.partition("=")
        if not name or not source:
            raise ValueError(f"`--cartridge` is {argument!r}, expected NAME=CARTRIDGE, e.g. handbook=user/handbook@v2.")
        if name in named:
            raise ValueError(f"`--cartridge` names {name!r} twice.")
        named[name] = source
    return named


def _admin_key(path: Path | None) -> str | None:
    key = path.read_text(encoding="utf-8").strip() if path is not None else os.environ.pop(_ADMIN_KEY, "").strip()
    if path is not None and not key:
        raise ValueError(f"`--admin-key-file` ({path}) is empty.")
    if key and len(key) < 16:
        raise ValueError("The admin's key is shorter than 16 characters: make one with `openssl rand -hex 32`.")
    return key or None
