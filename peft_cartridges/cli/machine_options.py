"""Options that say which machine a cost is of, for the commands that compute costs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from ..model_cost import DEVICES, Machine


def add_machine_arguments(parser: argparse.ArgumentParser, *, devices: int = 1) -> Any:
    """Adds them as a group, which is given back for further ones."""
    group = parser.add_argument_group("machine")
    group.add_argument("--machine", choices=list(DEVICES), default="h100", help="from its data sheet (default: h100)")
    group.add_argument("--devices", type=int, default=devices, help=f"how many (default: {devices})")
    group.add_argument(
        "--utilization",
        type=float,
        default=0.4,
        help="share that is reached of its FLOPs and of its bandwidth (default: 0.4)",
    )
    group.add_argument("--flops", type=float, help="instead: FLOPs per second reached by one")
    group.add_argument("--bandwidth", type=float, help="and bytes per second that it reads from memory")
    group.add_argument("--memory", type=float, help="bytes of one, instead of the data sheet's")
    return group


def machine_from(args: argparse.Namespace) -> Machine:
    """Raises:
    ValueError: a number is out of range, or one of `--flops` and `--bandwidth` is missing.
    """
    if (args.flops is None) != (args.bandwidth is None):
        raise ValueError("--flops and --bandwidth go together.")
    if args.flops is not None:
        machine = Machine(args.flops, args.bandwidth, devices=args.devices)
    else:
        machine = Machine.of(args.machine, utilization=args.utilization, devices=args.devices)
    return machine if args.memory is None else replace(machine, memory=args.memory)
