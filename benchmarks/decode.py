"""Decoding behind a cartridge: this package against stock PEFT, the full text in context, and no prefix at all.

    python -m benchmarks.decode --num-tokens 2048 --context-tokens 0 --batch-sizes 8 32
    python -m benchmarks.decode --num-tokens 216 --context-tokens 8192 --batch-sizes 1 8 32 64 --dtype bfloat16

Greedy decoding of `steps` tokens a row after a prompt of 16 tokens, with `generate`. The full text comes twice: a copy in
every row's cache (what transformers users do today, and the case where each user has another text), and one copy
shared by all rows through `shared_prefix` (everyone reads the same text).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import peft
import torch
from peft import get_peft_model

from benchmarks.harness import (
    PeakMemory,
    Settings,
    base_parser,
    load_model,
    median,
    print_table,
    run_in_turns,
    save,
    serve_worker,
    spread,
    synchronize,
    worker_settings,
)

PROMPT = 16


def ours(settings: Settings) -> dict[str, Any]:
    from peft_cartridges import CartridgeConfig

    model = get_peft_model(load_model(settings), CartridgeConfig(num_tokens=settings["num_tokens"]))
    return _measure(model, settings)


def stock_peft(settings: Settings) -> dict[str, Any]:
    config = peft.CartridgeConfig(num_virtual_tokens=settings["num_tokens"], task_type="CAUSAL_LM")
    return _measure(get_peft_model(load_model(settings), config), settings)


def no_prefix(settings: Settings) -> dict[str, Any]:
    return _measure(load_model(settings), settings)


def text_per_row(settings: Settings) -> dict[str, Any]:
    model = load_model(settings)
    text = _read_text(model, settings)
    prompt = torch.ones((settings["batch_size"], text.num_tokens), dtype=torch.long, device=settings["device"])

    def inputs() -> dict[str, Any]:
        ids = torch.cat([prompt, _prompt(settings)], dim=1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "past_key_values": text.to_cache(settings["batch_size"]),
        }

    return _measure(model, settings, inputs)


def text_shared(settings: Settings) -> dict[str, Any]:
    from peft_cartridges import shared_prefix

    model = load_model(settings)
    with shared_prefix(model, _read_text(model, settings)):
        return _measure(model, settings)


WORKERS = {
    "ours": ours,
    "stock_peft": stock_peft,
    "no_prefix": no_prefix,
    "text_per_row": text_per_row,
    "text_shared": text_shared,
}


def _read_text(model: Any, settings: Settings) -> Any:
    from peft_cartridges import KVPrefix

    ids = torch.randint(100, 10_000, (settings["context_tokens"],))
    return KVPrefix.from_input_ids(model, ids)


def _prompt(settings: Settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (settings["batch_size"], PROMPT)
    return torch.randint(100, 10_000, shape, generator=generator).to(settings["device"])


def _measure(model: Any, settings: Settings, inputs: Any = None) -> dict[str, Any]:
    """Tokens per second of the decoding loop: the time of `steps` new tokens less that of one."""
    model.eval()

    def plain() -> dict[str, Any]:
        ids = _prompt(settings)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def seconds(steps: int) -> float:
        arguments = (inputs or plain)()
        synchronize(settings)
        start = time.perf_counter()
        model.generate(**arguments, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0)
        synchronize(settings)
        return time.perf_counter() - start

    seconds(2)  # what is imported and loaded on first use is not this system's memory
    with PeakMemory(settings) as memory:
        loops = [seconds(settings["steps"] + 1) - seconds(1) for _ in range(settings["repeats"])]
    loop = statistics.median(loops)
    return {
        "tokens_per_second": settings["batch_size"] * settings["steps"] / loop,
        "milliseconds_per_step": 1000 * loop / settings["steps"],
        "memory_mb": memory.bytes / 2**20,
    }


def main() -> None:
    parser = base_parser(__doc__)
    parser.add_argument("--num-tokens", type=int, default=2048, help="length of the cartridge")
    parser.add_argument("--context-tokens", type=int, default=8192, help="length of the full text; 0 leaves it out")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded per row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--systems", nargs="+", choices=list(WORKERS), default=list(WORKERS))
    args = parser.parse_args()
    if serve_worker(args, WORKERS):
        return
    systems = [s for s in args.systems if args.context_tokens or not s.startswith("text_")]
    rows, results = [], {}
    for batch_size in args.batch_sizes:
        settings = worker_settings(args, batch_size=batch_size)
        measured = run_in_turns("benchmarks.decode", systems, settings, args.rounds)
        results[batch_size] = measured
        ours_speed = median(measured["ours"], "tokens_per_second")
        for system in systems:
            speed = median(measured[system], "tokens_per_second")
            ratio = ours_speed / speed if speed and ours_speed else None
            memory = median(measured[system], "memory_mb")
            rows.append([batch_size, system, speed, ratio, memory, spread(measured[system], "tokens_per_second")])
    print_table(["batch", "system", "tokens/s", "ours is faster by", "memory, MB", "spread"], rows)
    save(args, "decode", results)


if __name__ == "__main__":
    main()
