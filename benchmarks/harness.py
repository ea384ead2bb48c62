"""What the benchmarks share: systems in processes of their own, in turns; medians and spread; tables and JSON.

A benchmark module has `WORKERS`, a dictionary from a system's name to a function that takes the settings and returns
measurements; `run_in_turns` starts `python -m benchmarks.MODULE --worker SYSTEM --settings JSON` for each system in
turn, several rounds, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_cartridges.atomic_files import write_text

Settings = dict[str, Any]
Worker = Callable[[Settings], dict[str, Any]]

DEFAULT_MODEL = ".models/SmolLM2-135M-Instruct"


def base_parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder of the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=3, help="how often each system has its turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: benchmarks/results/NAME.json)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    return parser


def serve_worker(args: argparse.Namespace, workers: dict[str, Worker]) -> bool:
    """In a worker process: does the work, prints the measurements as its last line, and says so."""
    if args.worker is None:
        return False
    settings = json.loads(args.settings)
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    print(json.dumps(workers[args.worker](settings)))
    return True


def worker_settings(args: argparse.Namespace, **settings: Any) -> Settings:
    """What a worker is told: the command line's settings, some of them replaced."""
    own = {name: value for name, value in vars(args).items() if name not in ("output", "worker", "settings")}
    return {**own, **settings}


def run_in_turns(
    module: str, systems: Sequence[str], settings: Settings, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Measurements of each system, one per round. A system that fails (out of memory) is recorded and left out."""
    results: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    for number in range(rounds):
        for system in systems:
            if any("error" in result for result in results[system]):
                continue
            command = [sys.executable, "-m", module, "--worker", system, "--settings", json.dumps(settings)]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = done.stdout.strip().splitlines()
            if done.returncode or not lines:
                last = (done.stderr.strip().splitlines() or ["killed"])[-1]
                results[system].append({"error": last[:200]})
            else:
                results[system].append(json.loads(lines[-1]))
            print(f"  round {number + 1} {system}: {results[system][-1]}", file=sys.stderr, flush=True)
    return results


def median(results: list[dict[str, Any]], key: str) -> float | None:
    """Median over the rounds; `None` where the system failed."""
    values = [result[key] for result in results if key in result]
    return statistics.median(values) if values else None


def spread(results: list[dict[str, Any]], key: str) -> float | None:
    """Largest over smallest of the rounds."""
    values = [result[key] for result in results if key in result]
    return max(values) / min(values) if values and min(values) > 0 else None


def load_model(settings: Settings) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"]))
    return model.to(settings["device"])


def synchronize(settings: Settings) -> None:
    if settings["device"] != "cpu":
        torch.cuda.synchronize()


def timed(settings: Settings, work: Callable[[], Any], repeats: int, warm_up: int = 1) -> float:
    """Median seconds of `work`."""
    seconds = []
    for number in range(warm_up + repeats):
        synchronize(settings)
        start = time.perf_counter()
        work()
        synchronize(settings)
        if number >= warm_up:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class PeakMemory:
    """Peak memory in bytes above what was held when it began: allocations on a GPU, resident memory on a CPU."""

    def __init__(self, settings: Settings) -> None:
        self.on_cpu = settings["device"] == "cpu"
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if not self.on_cpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        if platform.system() == "Linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._before = self._peak = _resident_bytes()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.on_cpu:
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._stop.set()
        self._sampler.join()
        self.bytes = self._peak - self._before

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, _resident_bytes())


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def save(args: argparse.Namespace, name: str, results: Any) -> Path:
    """Writes the JSON, with the command and the machine, and says where."""
    path = args.output or Path(__file__).parent / "results" / f"{name}.json"
    record = {
        "command": f"python -m benchmarks.{name} " + " ".join(sys.argv[1:]),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": args.threads,
            "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
            "torch": torch.__version__,
        },
        "results": results,
    }
    write_text(path, json.dumps(record, indent=1))
    print(f"\nWritten to {path}")
    return path


def git_commit() -> str:
    """The commit that is measured; `+` where the code differs from it."""
    command = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        commit = subprocess.run([*command, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*command, "status", "--porcelain", "--", "peft_cartridges", "benchmarks"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(header), *cells]) for column in range(len(header))]
    for number, row in enumerate([list(header), ["-" * width for width in widths], *cells]):
        pad = str.ljust if number < 2 else str.rjust
        print("| " + " | ".join(pad(cell, width) for cell, width in zip(row, widths, strict=True)) + " |")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)
