"""The largest batch that decodes within a memory budget: a cartridge against what `benchmarks.decode` compares it with.

    python -m benchmarks.capacity --budget-mb 1024 --dtype bfloat16

Memory is the peak above the loaded model while each row reads a prompt of 16 tokens and decodes a few. Batches are
doubled until one is over the budget (or fails), and then halved in between to within a tenth.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.decode import WORKERS
from benchmarks.harness import base_parser, median, print_table, run_in_turns, save, worker_settings


def main() -> None:
    parser = base_parser(__doc__)
    parser.add_argument("--budget-mb", type=float, default=1024, help="memory above the model")
    parser.add_argument("--num-tokens", type=int, default=216, help="length of the cartridge")
    parser.add_argument("--context-tokens", type=int, default=8192, help="length of the full text")
    parser.add_argument("--steps", type=int, default=4, help="tokens decoded per row")
    parser.add_argument("--largest", type=int, default=4096, help="batch at which to stop looking")
    parser.add_argument("--systems", nargs="+", choices=list(WORKERS), default=list(WORKERS))
    args = parser.parse_args()
    tried: dict[str, dict[int, float | None]] = {system: {} for system in args.systems}

    def fits(system: str, batch_size: int) -> bool:
        settings = worker_settings(args, batch_size=batch_size, repeats=1)
        measured: dict[str, list[dict[str, Any]]] = run_in_turns("benchmarks.decode", [system], settings, args.rounds)
        memory = tried[system][batch_size] = median(measured[system], "memory_mb")
        return memory is not None and memory <= args.budget_mb

    largest = {
        system: _largest(lambda size, system=system: fits(system, size), args.largest) for system in args.systems
    }
    print_table(
        ["system", "largest batch", "its memory, MB", "times ours"],
        [
            [system, size, tried[system].get(size), size / largest["ours"] if largest.get("ours") else None]
            for system, size in largest.items()
        ],
    )
    save(args, "capacity", {"budget_mb": args.budget_mb, "largest": largest, "tried": tried})


def _largest(fits: Any, limit: int) -> int:
    """The largest batch that fits, to within a tenth; 0 if not even one does."""
    low, high = 0, 1
    while fits(high):
        low, high = high, high * 2
        if high > limit:
            return low
    while low and high - low > max(1, low // 10):
        middle = math.ceil((low + high) / 2)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


if __name__ == "__main__":
    main()
