"""How fast a batch of a conversation set is loaded, with made-up hidden states.

    python -m benchmarks.loading --hidden-size 4096

Rows are read at random from a set on disk, as a training step reads them: as `datasets` gives them (lists of Python
numbers), and as the trainer does (`with_fast_targets`: tensors, from Arrow's buffers).
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from peft_cartridges import load_self_study
from peft_cartridges.conversations import ConversationFolder, Part, make_features, with_fast_targets
from peft_cartridges.conversations.rows import rows_to_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learned-tokens", type=int, default=96)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        write(ConversationFolder(path), args)
        plain = load_self_study(path)
        for name, dataset in (("lists of numbers", plain), ("tensors", with_fast_targets(plain))):
            seconds = measure(dataset.__getitems__, args)
            print(f"{name:<18}{seconds:8.3f} s a batch of {args.batch_size} rows")


def write(folder: ConversationFolder, args: argparse.Namespace) -> None:
    generator, features = np.random.default_rng(0), make_features("hidden_states")
    for chunk, first in enumerate(range(0, args.rows, 32)):
        rows = []
        for row in range(first, min(first + 32, args.rows)):
            states = generator.standard_normal(args.learned_tokens * args.hidden_size, dtype=np.float32)
            rows.append(
                {
                    "id": f"x-{chunk}-{row}", "messages": [], "turns_start": 0, "chunk_id": "", "seed_type": "",
                    "context": "", "origin": "", "input_ids": np.zeros(args.learned_tokens + 64, dtype=np.int32),
                    "completion_mask": np.r_[np.zeros(64, np.int8), np.ones(args.learned_tokens, np.int8)],
                    "teacher_hidden_states": states.astype(np.float16),
                }
            )  # fmt: skip
        folder.write("hidden_states", Part(chunk, 0, len(rows)), rows_to_table(rows, features), {})
    folder.write_manifest({"format": 3, "report": {}, "left_out": {}})


def measure(read: Callable[[list[int]], Any], args: argparse.Namespace) -> float:
    """Median seconds of a batch."""
    rng, found = random.Random(0), []
    for _ in range(args.batches):
        rows = rng.sample(range(args.rows), args.batch_size)
        start = time.perf_counter()
        read(rows)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


if __name__ == "__main__":
    main()
