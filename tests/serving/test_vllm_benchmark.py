"""`benchmarks.serving` on a real vLLM with a tiny model: what it does before it measures, not what it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (it needs an environment of its own: make test-vllm)")

from tests.serving.models import save_base

ROOT = Path(__file__).parents[2]


def test_texts_and_cartridges_are_in_the_cache_before_anything_is_measured(tmp_path: Path) -> None:
    save_base(tmp_path / "base", vocab_size=20_000)
    command = [
        sys.executable, "-m", "benchmarks.serving", "--model", str(tmp_path / "base"), "--output",
        str(tmp_path / "figures.json"), "--rounds", "1", "--threads", "1", "--corpora", "1", "3",
        "--context-tokens", "400", "--question-tokens", "4", "--answer-tokens", "2", "--concurrency", "2",
        "--seconds", "0.1", "--gpu-memory-utilization", "0.05",
        "--systems", "no_context", "text_cached", "cartridge_10",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for system, (figures,) in json.loads((tmp_path / "figures.json").read_text())["results"].items():
        for corpora, found in figures.items():
            assert found["requests"] >= 2 and found["time_to_first_token"] > 0, system
            filled = int(corpora) if system in ("text_cached", "cartridge_10") else None
            assert found.get("filled") == filled, system
            assert ("time_to_first_token_cold" in found) == (filled is not None), system
