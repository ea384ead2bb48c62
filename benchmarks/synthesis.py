"""Throughput of synthesis, and what comes of it: this package against one conversation at a time, in one run.

    python -m benchmarks.synthesis --num-conversations 512

Three ways to write conversations about one text with the same model, settings and seed prompts: `one at a time` prefills
the chunk for every question and every answer, as recipes do that call `generate` on a prompt with the text in it;
`batches` share the chunk's prefix and run to their longest row; `refilled` gives a finished row's place to the next
prompt. The first two are timed on a sample. Tokens per second count generated tokens over everything that it takes,
prefill, decoding and, where it is done, the teacher's targets.

    python -m benchmarks.synthesis --fake-servers 2

How the queue scales, without a model: the same conversations by one server that answers every request after
`--latency` seconds, a fixed number at a time, and by several of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cartridges import SelfStudySynthesizer, SynthesisConfig
from peft_cartridges.chat import ChatCodec
from peft_cartridges.conversations import format_report, read_report
from peft_cartridges.corpus import Document, chunk_corpus
from peft_cartridges.self_study.prompts import PAPER_TYPES, draw_seed_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=Path, default=Path("examples/data/lighthouse_handbook.md"))
    parser.add_argument("--num-conversations", type=int, default=512)
    parser.add_argument("--sample", type=int, default=4, help="conversations of the one-at-a-time recipe")
    parser.add_argument(
        "--batch-sample", type=int, default=64, help="conversations of the batches that are not refilled"
    )
    parser.add_argument("--fake-servers", type=int, metavar="N", help="measure the queue with one server and with N")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds a fake server takes to answer")
    parser.add_argument("--concurrency", type=int, default=8, help="requests that a fake server answers at a time")
    args = parser.parse_args()
    if args.fake_servers:
        fake_servers(args)
        return
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    model = model.to(args.device).eval()
    text = Document(args.text.name, args.text.read_text())
    # Recitations cost no generation: without them all three do the same.
    settings: dict[str, Any] = {"recitation_share": 0.0, "max_attempts": 1, "conversations_per_chunk": 64}

    def synthesize(number: int, **options: Any) -> tuple[float, dict[str, Any]]:
        start = time.perf_counter()
        config = SynthesisConfig(num_conversations=number, **settings, **options)
        report = read_report(SelfStudySynthesizer(model, tokenizer, config).synthesize([text]))
        return report["report"]["generated_tokens"] / (time.perf_counter() - start), report

    slow = one_at_a_time(model, tokenizer, text, args.sample)
    batches, _ = synthesize(args.batch_sample, refill_finished_rows=False)
    refilled, report = synthesize(args.num_conversations)
    print(f"\n{'':16}{'tokens/s':>10}{'times':>8}")
    for name, speed in (("one at a time", slow), ("batches", batches), ("refilled", refilled)):
        print(f"{name:16}{speed:>10,.1f}{speed / slow:>8.1f}")
    print(f"\n{format_report(report)}")


def fake_servers(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Document(args.text.name, args.text.read_text())
    seconds = {}
    for number in (1, args.fake_servers):
        with contextlib.ExitStack() as stack:
            urls = [stack.enter_context(fake_server(args.latency)) for _ in range(number)]
            config = SynthesisConfig(
                num_conversations=args.num_conversations, recitation_share=0.0, max_attempts=1, quality_filters=[],
                teacher_targets="live", engine="openai", engine_model="fake", base_url=urls,
                concurrency=args.concurrency,
            )  # fmt: skip
            synthesizer = SelfStudySynthesizer(None, tokenizer, config)
            start = time.perf_counter()
            synthesizer.synthesize([text])
            seconds[number] = time.perf_counter() - start
    ideal = args.num_conversations * 2 * args.latency / args.concurrency
    print(f"\n{'servers':>8}{'seconds':>10}{'of ideal':>10}{'times':>8}")
    for number, took in seconds.items():
        print(f"{number:>8}{took:>10.1f}{ideal / number / took:>10.0%}{seconds[1] / took:>8.2f}")


@contextlib.contextmanager
def fake_server(latency: float) -> Iterator[str]:
    """A server that says the same few tokens after some time, whatever it is asked; gives its base URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            time.sleep(latency)
            tokens = [f"token_id:{1000 + token % 7 + request['seed'] % 97}" for token in range(8)]
            logprobs = {"tokens": tokens, "top_logprobs": [{token: -0.1} for token in tokens]}
            choice = {"index": 0, "text": "", "finish_reason": "stop", "logprobs": logprobs}
            body = json.dumps(
                {"id": "x", "object": "text_completion", "created": 0, "model": "fake", "choices": [choice]}
            ).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@torch.no_grad()
def one_at_a_time(model: Any, tokenizer: Any, text: Document, number: int) -> float:
    """Generated tokens per second."""
    args, rng, tokens = SynthesisConfig(), random.Random(0), 0
    chunks = chunk_corpus([text], tokenizer, min_tokens=args.min_chunk_tokens, max_tokens=args.max_chunk_tokens, seed=0)

    def generate(context: list[int], question: str, longest: int, temperature: float) -> list[int]:
        ids = torch.tensor([context + ChatCodec(model, tokenizer).encode_prompt([question])], device=model.device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=True, temperature=temperature,
            top_k=0, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return output[0, ids.shape[1] :].tolist()

    start = time.perf_counter()
    for index in range(number):
        context = ChatCodec(model, tokenizer).encode_context(next(chunks).context)
        seed = draw_seed_prompt(PAPER_TYPES[index % len(PAPER_TYPES)], rng)
        asked = generate(context, seed, args.max_question_tokens, args.question_temperature)
        question = tokenizer.decode(asked, skip_special_tokens=True)
        tokens += len(asked) + len(generate(context, question, args.max_answer_tokens, args.answer_temperature))
    return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
