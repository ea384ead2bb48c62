"""A small run of the synthesizer, to be started, killed and carried on by tests; also in several processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset

from peft_cartridges import SelfStudySynthesizer, SynthesisConfig
from peft_cartridges.self_study.chunk_study import ChunkStudy
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXT = " ".join(f"the captain of w{number} says no . the sea is w{number + 1} ." for number in range(50, 110))


def settings(**options: Any) -> SynthesisConfig:
    defaults: dict[str, Any] = {
        "num_conversations": 90, "conversations_per_chunk": 2, "min_chunk_tokens": 30, "max_chunk_tokens": 40,
        "max_question_tokens": 6, "max_answer_tokens": 8, "generation_batch_size": 4, "recitation_share": 0.0,
    }  # fmt: skip
    return SynthesisConfig(**{**defaults, **options})


def synthesize(output_dir: str | Path | None, **options: Any) -> Dataset:
    return SelfStudySynthesizer(tiny_model(), tiny_tokenizer(), settings(**options)).synthesize(TEXT, output_dir)


def slowly(output_dir: str) -> None:
    """With time to be killed between what is written and its name."""
    os.fsync = lambda descriptor: time.sleep(0.01)
    synthesize(output_dir)


if __name__ == "__main__":
    study, chunks = ChunkStudy.study, []

    def counted(self: ChunkStudy, chunk: Any, *args: Any) -> Any:
        chunks.append(chunk.id)
        return study(self, chunk, *args)

    ChunkStudy.study = counted
    made = synthesize(sys.argv[1], num_conversations=int(sys.argv[2]))
    print(f"rank {os.environ.get('RANK', '0')}: {len(chunks)} chunks studied, {len(made)} rows", flush=True)
