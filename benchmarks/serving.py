"""Serving many texts on one vLLM engine: requests per second, time to first token and KV memory, over the number of texts.

    .venv-vllm/bin/python -m benchmarks.serving --corpora 1 64 --rounds 1

Every request is a question of its own about one of the texts, drawn at random. The systems: `no_context` (the bare
question), `text` (the full text in front, without prefix caching), `text_cached` (with prefix caching), and cartridges
of a part of the text's length. All have the same memory for keys and values (`--cache-gib`), and the engine's prefix cache
is filled before anything is measured, with as many texts or cartridges as it has room for. Texts and cartridges are
random: what they say changes no speed.

Time to first token is measured with one request at a time (`cold`: of the first request to each text or cartridge, which
fills the cache), requests per second with `--concurrency` at once.

Needs cores that do nothing else: vLLM's threads on CPU wait for each other in a busy loop, and beside other work a
request can take forty times as long. `OMP_WAIT_POLICY=passive` mends that, and is slower on cores that are free.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.harness import (
    Settings,
    base_parser,
    median,
    print_table,
    run_in_turns,
    save,
    serve_worker,
    spread,
    worker_settings,
)
from peft_cartridges import CartridgeConfig, KVPrefix
from peft_cartridges.adapter_folder import write_cartridge


def no_context(settings: Settings) -> dict[str, Any]:
    return _measure(settings, text_tokens=0)


def text(settings: Settings) -> dict[str, Any]:
    return _measure(settings, text_tokens=settings["context_tokens"], prefix_caching=False)


def text_cached(settings: Settings) -> dict[str, Any]:
    return _measure(settings, text_tokens=settings["context_tokens"])


def cartridge_10(settings: Settings) -> dict[str, Any]:
    return _measure(settings, cartridge_tokens=settings["context_tokens"] // 10)


def cartridge_38(settings: Settings) -> dict[str, Any]:
    return _measure(settings, cartridge_tokens=settings["context_tokens"] // 38)


WORKERS = {
    "no_context": no_context,
    "text": text,
    "text_cached": text_cached,
    "cartridge_10": cartridge_10,
    "cartridge_38": cartridge_38,
}


def _measure(
    settings: Settings, *, text_tokens: int = 0, cartridge_tokens: int = 0, prefix_caching: bool = True
) -> dict[str, Any]:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings["cache_gib"])
    from peft_cartridges.serving import CartridgeLLM

    with tempfile.TemporaryDirectory() as folder:
        number = max(settings["corpora"]) if cartridge_tokens else 0
        cartridges = {
            f"c{index}": _random_cartridge(settings, cartridge_tokens, index, folder) for index in range(number)
        }
        llm = CartridgeLLM(
            settings["model"],
            cartridges,
            dtype=settings["dtype"],
            enforce_eager=True,
            enable_prefix_caching=prefix_caching,
            max_num_seqs=settings["concurrency"],
            gpu_memory_utilization=settings["gpu_memory_utilization"],
        )
        work = _Work(llm, settings, text_tokens, cartridge_tokens)
        results = {}
        for corpora in settings["corpora"]:
            results[str(corpora)] = work.measure(corpora, fill=prefix_caching)
    return results


def _random_cartridge(settings: Settings, num_tokens: int, seed: int, folder: str) -> Path:
    config = AutoConfig.from_pretrained(settings["model"]).get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(seed)
    layers = [
        torch.randn(config.num_key_value_heads, num_tokens, head_dim, generator=generator, dtype=torch.bfloat16)
        for _ in range(2 * config.num_hidden_layers)
    ]
    path = Path(folder) / f"c{seed}"
    write_cartridge(
        path,
        CartridgeConfig(
            num_tokens=num_tokens,
            num_layers=config.num_hidden_layers,
            num_attention_heads=config.num_key_value_heads,
            token_dim=config.num_key_value_heads * head_dim,
        ),
        KVPrefix(tuple(layers[0::2]), tuple(layers[1::2])),
    )
    return path


class _Work:
    """Questions about random texts, put to one engine."""

    def __init__(self, llm: Any, settings: Settings, text_tokens: int, cartridge_tokens: int) -> None:
        self.llm, self.settings = llm, settings
        self.text_tokens, self.cartridge_tokens = text_tokens, cartridge_tokens
        self.context = text_tokens + cartridge_tokens
        self.random = random.Random(0)
        self.count = 0
        cache = llm.llm_engine.vllm_config.cache_config
        self.capacity = cache.num_gpu_blocks * cache.block_size
        config = llm.llm_engine.model_config.hf_text_config
        heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        self.bytes_per_token = (
            2 * config.num_hidden_layers * heads * torch.finfo(llm.llm_engine.model_config.dtype).bits // 8
        )

    def measure(self, corpora: int, *, fill: bool) -> dict[str, Any]:
        self.run(corpora, concurrency=1, requests=2)  # what is compiled or allocated on first use
        self.llm.reset_prefix_cache()
        cold: list[float] = []
        for index in range(min(corpora, self.capacity // self.context) if fill and self.context else 0):
            # One token fills the cache as well as sixteen.
            cold += self.run(corpora, concurrency=1, requests=1, corpus=index, answer_tokens=1)["first"]
        alone = self.run(corpora, concurrency=1, seconds=self.settings["seconds"] / 2)
        many = self.run(corpora, concurrency=self.settings["concurrency"], seconds=self.settings["seconds"])
        return {
            "requests_per_second": many["requests"] / many["seconds"],
            "tokens_per_second": many["requests"] * self.settings["answer_tokens"] / many["seconds"],
            "time_to_first_token": statistics.median(alone["first"]),
            **({"time_to_first_token_cold": statistics.median(cold), "filled": len(cold)} if cold else {}),
            "requests": alone["requests"] + many["requests"],
            "kv_mb_per_corpus": self.context * self.bytes_per_token / 2**20,
            "corpora_that_fit": self.capacity // self.context if self.context else None,
        }

    def run(
        self,
        corpora: int,
        *,
        concurrency: int,
        requests: int | None = None,
        seconds: float | None = None,
        corpus: int | None = None,
        answer_tokens: int | None = None,
    ) -> dict[str, Any]:
        """Keeps `concurrency` requests under way, for so many requests, or seconds and what is under way then."""
        engine, started, sent, first = self.llm.llm_engine, {}, 0, []
        begin = time.perf_counter()

        def wanted() -> bool:
            return sent < requests if requests is not None else time.perf_counter() - begin < (seconds or 0)

        done = 0
        while started or wanted():
            while len(started) < concurrency and wanted():
                drawn = self.random.randrange(corpora) if corpus is None else corpus
                name = self._send(drawn, answer_tokens or self.settings["answer_tokens"])
                started[name] = [time.perf_counter(), False]
                sent += 1
            for output in engine.step():
                name = output.request_id.split("-")[0]
                if not started[name][1] and output.outputs[0].token_ids:
                    first.append(time.perf_counter() - started[name][0])
                    started[name][1] = True
                if output.finished:
                    if output.outputs[0].finish_reason == "error":
                        raise RuntimeError(f"Request {name} failed: the engine's log says why.")
                    del started[name]
                    done += 1
        return {"requests": done, "seconds": time.perf_counter() - begin, "first": first}

    def _send(self, corpus: int, answer_tokens: int) -> str:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        from peft_cartridges.serving.engine_requests import behind_cartridge, cache_salt

        question = [self.random.randrange(1000, 20_000) for _ in range(self.settings["question_tokens"])]
        params = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True)
        prompt: Any = tokens_input(question)
        if self.text_tokens:
            words = random.Random(corpus)
            prompt = tokens_input([words.randrange(1000, 20_000) for _ in range(self.text_tokens)] + question)
        if self.cartridge_tokens:
            entry = self.llm.cartridges.find(f"c{corpus}")
            prompt, params = behind_cartridge(
                prompt,
                params,
                entry.stored,
                name=entry.name,
                alphabet=self.llm._alphabet,
                salt=cache_salt(b"", entry.stored.digest),
                max_model_len=self.llm.max_model_len,
            )
        self.count += 1
        self.llm.llm_engine.add_request(str(self.count), prompt, params)
        return str(self.count)


def main() -> None:
    parser = base_parser(__doc__)
    parser.add_argument("--corpora", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of texts")
    parser.add_argument("--context-tokens", type=int, default=8000, help="length of a text")
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once")
    parser.add_argument("--seconds", type=float, default=20, help="for each measurement")
    parser.add_argument("--cache-gib", type=int, default=1, help="memory for keys and values (CPU)")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.1, help="vLLM's share of the memory (GPU)")
    parser.add_argument("--systems", nargs="+", choices=list(WORKERS), default=list(WORKERS))
    args = parser.parse_args()
    if serve_worker(args, WORKERS):
        return
    measured = run_in_turns("benchmarks.serving", args.systems, worker_settings(args), args.rounds)
    rows = []
    for corpora in map(str, args.corpora):
        for system in args.systems:
            rounds = [one.get(corpora, one) for one in measured[system]]
            numbers = [
                *("requests_per_second", "tokens_per_second", "time_to_first_token", "time_to_first_token_cold"),
                "kv_mb_per_corpus",
            ]
            rows.append(
                [
                    corpora,
                    system,
                    *(median(rounds, number) for number in numbers),
                    spread(rounds, "requests_per_second"),
                ]
            )
    header = ["texts", "system", "requests/s", "tokens/s", "first token, s", "cold, s", "KV, MB a text", "spread"]
    print_table(header, rows)
    save(args, "serving", measured)


if __name__ == "__main__":
    main()
