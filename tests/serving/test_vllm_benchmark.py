"""`benchmarks.serving` on a real vLLM with a tiny model: what it does before it measures, not what it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (it needs an environment of its own: make test-vllm)")

from benchmarks import serving
from tests.serving.models import save_base

CORPORA = 3


@pytest.mark.parametrize("system", ["no_context", "text", "text_cached", "cartridge_10"])
def test_all_texts_are_in_the_cache_before_anything_is_measured(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a cache and something to put in: texts and cartridges alike, each by a request of its own."""
    save_base(tmp_path / "base", vocab_size=20_000, max_position_embeddings=512)
    asked: list[tuple[int, int]] = []
    send = serving._Work._send

    def remembered(work: Any, corpus: int, answer_tokens: int) -> str:
        asked.append((corpus, answer_tokens))
        return send(work, corpus, answer_tokens)

    monkeypatch.setattr(serving._Work, "_send", remembered)
    settings = {
        "model": str(tmp_path / "base"), "dtype": "float32", "corpora": [CORPORA], "context_tokens": 400,
        "question_tokens": 4, "answer_tokens": 2, "concurrency": 2, "seconds": 0.1, "cache_gib": 1,
        "gpu_memory_utilization": 0.05,
    }  # fmt: skip
    measured = serving.WORKERS[system](settings)[str(CORPORA)]
    fills = system in ("text_cached", "cartridge_10")
    assert ([corpus for corpus, answer_tokens in asked if answer_tokens == 1] == list(range(CORPORA))) == fills
    assert ("time_to_first_token_cold" in measured) == fills
    assert measured["requests"] >= 2 and measured["time_to_first_token"] > 0
