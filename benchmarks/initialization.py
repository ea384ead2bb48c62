"""How much of the in-context gap a cartridge closes without training, by the strategy that it was initialized with.

    python -m benchmarks.initialization FILE.jsonl:ID FILE.jsonl:ID … --strategies most_attended attention_matching
    python -m benchmarks.initialization FILE.jsonl:ID --strategies 'attention_matching steps=120' --shrink 20
    python -m benchmarks.initialization FILE.jsonl:ID --strategies most_attended --quantize int8 int4 fp8

A file has one JSON object a line: `id`, `text`, `questions` (`question` and `answer` each); `*` instead of an identifier
takes all of them. Closed is the share of the gap between no context and the full text in context, in mean negative
log-likelihood of the gold answers. Seconds are those of making the cartridge, by the wall and by the processor: on a busy
machine, processor seconds by the number of threads are what the wall would show. Options of a strategy stand behind its
name, as JSON. With `--quantize`, the cartridge is also measured as it comes back from a file of fewer bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import harness
from peft_cartridges import (
    CartridgeConfig,
    KVPrefix,
    gold_answer_nll,
    initialize_cartridge,
    quantize_cartridge,
    shared_prefix,
)
from peft_cartridges.adapter_folder import WEIGHTS_FILE, read_cartridge
from peft_cartridges.chat import ChatCodec
from peft_cartridges.evaluation import ContextGap


def read_documents(sources: list[str]) -> list[dict[str, Any]]:
    """The documents that `FILE:ID` name.

    Raises:
        ValueError: a file has none of that name.
    """
    documents: list[dict[str, Any]] = []
    for source in sources:
        path, _, name = source.rpartition(":")
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        chosen = [line for line in lines if name in ("*", line["id"])]
        if not chosen:
            raise ValueError(f"{path} has no document {name!r}.")
        documents += chosen
    return documents


def parse_strategy(given: str) -> tuple[str, dict[str, Any]]:
    """`attention_matching value_ridge=2` as the name and its options."""
    name, *options = given.split()
    return name, {key: json.loads(value) for key, value in (option.split("=", 1) for option in options)}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each document and strategy."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    records = []
    for document in read_documents(args.documents):
        questions = [{"question": pair["question"], "answer": pair["answer"]} for pair in document["questions"]]
        ids = ChatCodec(base, tokenizer).encode_context(document["text"])[: args.max_tokens]
        text = document["text"] if args.max_tokens is None else tokenizer.decode(ids, skip_special_tokens=True)
        none = gold_answer_nll(base, tokenizer, questions)
        with shared_prefix(base, KVPrefix.from_text(base, tokenizer, text)):
            gap = ContextGap(none, gold_answer_nll(base, tokenizer, questions, in_context=True))
        num_tokens = len(ids) // args.shrink
        for strategy in args.strategies:
            name, options = parse_strategy(strategy)
            model = get_peft_model(base, CartridgeConfig(num_tokens=num_tokens))
            wall, processor = time.perf_counter(), time.process_time()
            initialize_cartridge(model, tokenizer, text=text, strategy=name, **options)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            for scheme, num_bytes in as_stored(model, args.quantize):
                nll = gold_answer_nll(model, tokenizer, questions, in_context=True)
                record = {
                    "document": document["id"], "tokens": len(ids), "num_tokens": num_tokens,
                    "strategy": strategy, "stored": scheme, "bytes": num_bytes,
                    "no_context": gap.no_context, "full_context": gap.full_context, "nll": nll,
                    "closed": gap.closed(nll), "wall_seconds": wall, "processor_seconds": processor,
                }  # fmt: skip
                print(json.dumps(record), flush=True)
                records.append(record)
            base = model.unload()
    return records


def as_stored(model: PeftModel, schemes: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Puts what comes back from a file into the cartridge, for each scheme in turn, as it is first; the scheme, and bytes of
    the weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "whole")
        yield "as it is", (Path(folder) / "whole" / WEIGHTS_FILE).stat().st_size
        for scheme in schemes:
            _, num_bytes = quantize_cartridge(Path(folder) / "whole", Path(folder) / scheme, scheme)  # type: ignore[arg-type]
            initialize_cartridge(model, prefix=read_cartridge(Path(folder) / scheme)[1])
            yield scheme, num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", metavar="FILE:ID")
    parser.add_argument(
        "--strategies", nargs="+", default=["first_tokens", "sampled_chunks", "most_attended", "attention_matching"]
    )
    parser.add_argument("--quantize", nargs="*", default=[], choices=["int8", "int4", "fp8", "none"])
    parser.add_argument("--shrink", type=int, default=10, help="how many times shorter than the text the cartridge is")
    parser.add_argument("--max-tokens", type=int, help="cut longer documents (default: whole)")
    parser.add_argument("--model", default=harness.DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    records = measure(args)
    harness.save(args, "initialization", records)
    rows = []
    for strategy, stored in dict.fromkeys((record["strategy"], record["stored"]) for record in records):
        of_it = [record for record in records if (record["strategy"], record["stored"]) == (strategy, stored)]
        means = {
            name: statistics.mean(record[name] for record in of_it)
            for name in ("closed", "bytes", "wall_seconds", "processor_seconds")
        }
        least = min(record["closed"] for record in of_it)
        rows.append(
            [
                strategy,
                stored,
                len(of_it),
                f"{means['closed']:.1%}",
                f"{least:.1%}",
                f"{means['bytes'] / 1000000.0:.2f}",
                means["wall_seconds"],
                means["processor_seconds"],
            ]
        )
    header = ["strategy", "stored", "documents", "closed, mean", "least", "MB", "seconds", "processor seconds"]
    harness.print_table(header, rows)


if __name__ == "__main__":
    main()
