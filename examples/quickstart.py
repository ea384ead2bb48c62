"""Trains a cartridge on a small handbook, and shows what it is worth against no context and the full text in context.

    make quickstart            # or: python examples/quickstart.py
    python examples/quickstart.py --fast

The model writes conversations about the handbook with the text in its context, the cartridge learns to answer like
it, and gold questions that training never saw are the measure. In the end the adapter is saved and loaded again by
stock PEFT, in a process that does not know this package.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peft_cartridges import (
    CartridgeConfig,
    KVPrefix,
    SelfStudyConfig,
    SelfStudyTrainer,
    gold_answer_nll,
    shared_prefix,
)
from peft_cartridges.chat import ChatCodec
from smollm2 import get_smollm2

DATA = Path(__file__).parent / "data"

# Runs in a process of its own: only stock PEFT, loading the adapter and saving the logits of some token ids.
STOCK_PEFT = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model_path, adapter_path, ids, logits_path = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter_path).eval()
input_ids = torch.tensor([[int(token) for token in ids.split(",")]])
with torch.no_grad():
    logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
assert not any(name.startswith("peft_cartridges") for name in sys.modules), "this was to be stock PEFT alone"
save_file({"logits": logits.contiguous()}, logits_path)
"""


@dataclass
class Row:
    """What one way of knowing the text is worth."""

    name: str
    nll: float
    kv_tokens: int
    kv_bytes: int
    tokens_per_second: float
    answer: str


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    corpus = (DATA / f"{args.corpus}.md").read_text()
    questions = [json.loads(line) for line in (DATA / f"{args.corpus}.questions.jsonl").read_text().splitlines()]
    model_path = get_smollm2(args.model)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)

    shown = questions[args.question]["question"]

    print(f"1/4  {args.corpus}: without context, and with all of it in context")
    document = KVPrefix.from_text(model, tokenizer, corpus)
    none = measure("no context", model, tokenizer, questions, shown)
    full = measure("full text in context", model, tokenizer, questions, shown, document)

    print(f"2/4  Self-study: {args.num_conversations} conversations, then {args.max_steps} training steps")
    trainer = SelfStudyTrainer(
        model=model,
        args=SelfStudyConfig(
            output_dir=str(args.output_dir),
            num_conversations=args.num_conversations,
            recitation_share=0.75,  # a model of 135M parameters asks and answers poorly
            max_steps=args.max_steps,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=Dataset.from_dict({"text": [corpus]}),
        processing_class=tokenizer,
        peft_config=CartridgeConfig(num_tokens=args.num_tokens),
    )
    trainer.train()

    print("3/4  Questions that training never saw")
    cartridge = measure("cartridge", trainer.model.eval(), trainer.processing_class, questions, shown)
    rows = [none, cartridge, full]
    gap_closed = [(none.nll - row.nll) / (none.nll - full.nll) for row in rows]
    print_table(rows, gap_closed, shown)

    print("4/4  Saving, and loading with stock PEFT in a process of its own")
    trainer.save_model()
    ids = ChatCodec(None, tokenizer).encode_turns([{"role": "user", "content": shown}])
    difference = compare_with_stock_peft(model_path, args.output_dir, ids)
    print(f"     Largest difference of a logit, this package against stock PEFT: {difference:.1e}")
    results = {"rows": [vars(row) for row in rows], "gap_closed": gap_closed[1], "stock_peft_difference": difference}
    (args.output_dir / "quickstart.json").write_text(json.dumps(results, indent=2))
    print(f"     The cartridge is in {args.output_dir}. {time.perf_counter() - started:.0f} s in all.")
    if difference > 1e-3:
        sys.exit("Stock PEFT's logits differ: the adapter file is not what it should be.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a small run, to see that everything works")
    parser.add_argument("--corpus", default="lighthouse_handbook", help="a text in examples/data, without its ending")
    parser.add_argument(
        "--model", default=".models/SmolLM2-135M-Instruct", help="folder of the model; fetched if empty"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"), help="where the cartridge goes")
    parser.add_argument("--num-tokens", type=int, default=256, help="length of the cartridge")
    parser.add_argument("--num-conversations", type=int, help="conversations to write (default: 256, fast: 64)")
    parser.add_argument("--max-steps", type=int, help="training steps of 16 conversations (default: 40, fast: 16)")
    parser.add_argument("--question", type=int, default=3, help="number of the gold question whose answers are shown")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    args.num_conversations = args.num_conversations or (64 if args.fast else 256)
    args.max_steps = args.max_steps or (16 if args.fast else 40)
    return args


def measure(
    name: str,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict[str, str]],
    shown: str,
    prefix: KVPrefix | None = None,
) -> Row:
    """One row of the table. A `prefix` is the full text, put in front of the model here; whatever else stands in front
    of it (nothing, or its cartridge) is there already."""
    in_context = shared_prefix(model, prefix) if prefix is not None else contextlib.nullcontext()
    with in_context:
        nll = gold_answer_nll(model, tokenizer, questions, in_context=prefix is not None)
        ids = ChatCodec(None, tokenizer).encode_turns([{"role": "user", "content": shown}], add_generation_prompt=True)
        if prefix is None:
            ids = ChatCodec(None, tokenizer).preamble + ids
        input_ids = torch.tensor([ids], device=model.device)
        output = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=48, do_sample=False
        )
    answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    if prefix is None and isinstance(model, PeftModel):
        held = model.get_kv_prefix().to(model.dtype)
    else:
        held = prefix
    tokens, size = (0, 0) if held is None else (held.num_tokens, held.nbytes)
    return Row(name, nll, tokens, size, decode_speed(model, prefix), answer)


@torch.no_grad()
def decode_speed(model: PreTrainedModel | PeftModel, prefix: KVPrefix | None, batch_size: int = 16) -> float:
    """Tokens per second of greedy decoding: each row holds its own copy of the full text, as `generate` would have it;
    the cartridge is one for all. The median of five rounds."""
    cache = DynamicCache() if prefix is None else prefix.to_cache(batch_size)
    token = torch.ones((batch_size, 1), dtype=torch.long, device=model.device)
    speeds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(8):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        speeds.append(8 * batch_size / (time.perf_counter() - start))
    return statistics.median(speeds)


def print_table(rows: list[Row], gap_closed: list[float], shown: str) -> None:
    print(f"\n{'':22}{'gold-answer NLL':>16}{'gap closed':>12}{'KV tokens':>11}{'KV size':>10}{'decode, batch 16':>19}")
    for row, closed in zip(rows, gap_closed, strict=True):
        print(
            f"{row.name:22}{row.nll:>16.3f}{closed:>11.0%} {row.kv_tokens:>10,}{row.kv_bytes / 2**20:>7.1f} MB"
            f"{row.tokens_per_second:>10,.0f} tokens/s"
        )
    print(f"\n{shown}")
    for row in rows:
        print(f"  {row.name + ':':22}{' '.join(row.answer.split())}")
    print()


def compare_with_stock_peft(model_path: Path, adapter_path: Path, ids: list[int]) -> float:
    """Largest difference of a logit between this package and stock PEFT, in float32, for some token ids."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter_path).eval()
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits
    with tempfile.TemporaryDirectory() as folder:
        logits_path = Path(folder) / "logits.safetensors"
        command = [sys.executable, "-c", STOCK_PEFT, str(model_path), str(adapter_path), ",".join(map(str, ids))]
        subprocess.run([*command, str(logits_path)], check=True)
        stock = load_file(logits_path)["logits"]
    return (ours - stock).abs().max().item()


if __name__ == "__main__":
    main()
