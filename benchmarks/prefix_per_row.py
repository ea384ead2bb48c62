"""Every row of a batch behind a cartridge of its own: one decoding step's attention against a cache per row.

    python -m benchmarks.prefix_per_row --rows 64 --num-tokens 256 --dtype bfloat16

One layer's attention in SmolLM2's shape for `rows` queries, as the layer has them when decoding: this package's
`shared_prefix_attention` with the rows' prefixes beside their own keys and values, and what transformers does with the same
prefixes in its dynamic cache, which appends the new token's keys and values to each row's and attends to all. `index`
names each row's prefix instead of holding a copy for it. The systems take turns in one process; microseconds, the fastest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache

from benchmarks.harness import print_table, save
from peft_cartridges.attention.plain_attention import Scoring
from peft_cartridges.attention.shared_prefix_attention import RowPrefixes, shared_prefix_attention

HEADS, KV_HEADS, DIM = 9, 3, 64


def systems(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """One decoding step's work by system."""
    rows, dtype, device = args.rows, getattr(torch, args.dtype), args.device

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    query = random(rows, 1, HEADS, DIM).transpose(1, 2)
    new, own = random(2, rows, KV_HEADS, 1, DIM), random(2, rows, KV_HEADS, args.own_tokens, DIM)
    prefix = random(2, rows, KV_HEADS, args.num_tokens, DIM)
    lengths = torch.randint(args.num_tokens // 2, args.num_tokens + 1, (rows,), device=device)
    index = torch.randperm(rows, device=device)
    whole = torch.cat([prefix, own], dim=3)
    mask = torch.ones(rows, 1, 1, whole.shape[3] + 1, dtype=torch.bool, device=device)
    mask[..., : args.num_tokens] = torch.arange(args.num_tokens, device=device) < lengths[:, None, None, None]
    scoring = Scoring(DIM**-0.5)

    def ours(prefixes: RowPrefixes) -> torch.Tensor:
        cache = DynamicCache([(own[0], own[1])])
        return shared_prefix_attention(query, *cache.update(new[0], new[1], 0), [prefixes], scoring=scoring)

    def per_row(mask: torch.Tensor | None) -> torch.Tensor:
        keys, values = DynamicCache([(whole[0], whole[1])]).update(new[0], new[1], 0)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(query, keys, values, attn_mask=mask, enable_gqa=True)

    return {
        "ours": lambda: ours(RowPrefixes(prefix[0], prefix[1])),
        "transformers' cache per row": lambda: per_row(None),
        "ours, lengths differ": lambda: ours(RowPrefixes(prefix[0], prefix[1], lengths)),
        "transformers' cache per row, lengths differ": lambda: per_row(mask),
        "ours, by index": lambda: ours(RowPrefixes(prefix[0], prefix[1], lengths, index)),
        "ours, 4 prefixes by index": lambda: ours(RowPrefixes(prefix[0, :4], prefix[1, :4], lengths[:4], index % 4)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--num-tokens", type=int, default=256)
    parser.add_argument("--own-tokens", type=int, default=32, help="tokens that each row has of its own")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: benchmarks/results/NAME.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = systems(args)
    best = dict.fromkeys(work, float("inf"))
    with torch.inference_mode():
        for _ in range(args.repeats):
            for name, step in work.items():
                start = time.perf_counter()
                step()
                if args.device != "cpu":
                    torch.cuda.synchronize()
                best[name] = min(best[name], 1e6 * (time.perf_counter() - start))
    print_table(["system", "µs a layer"], [[name, value] for name, value in best.items()])
    save(args, "prefix_per_row", best)


if __name__ == "__main__":
    main()
