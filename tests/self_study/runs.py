"""A small run of the synthesizer, to be started, killed and carried on by tests; also in several processes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from datasets import Dataset

from peft_cartridges import SelfStudySynthesizer, SynthesisConfig
from peft_cartridges.conversations import ConversationFolder
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXT = " ".join(f"the captain of w{number} says no . the sea is w{number + 1} ." for number in range(50, 110))


def settings(**options: Any) -> SynthesisConfig:
    defaults: dict[str, Any] = {
        "num_conversations": 90, "conversations_per_chunk": 2, "min_chunk_tokens": 30, "max_chunk_tokens": 40,
        "max_question_tokens": 6, "max_answer_tokens": 8, "generation_batch_size": 4, "recitation_share": 0.0,
        "off_context_share": 0.0,
    }  # fmt: skip
    return SynthesisConfig(**{**defaults, **options})


def synthesize(output_dir: str | Path | None, **options: Any) -> Dataset:
    return SelfStudySynthesizer(tiny_model(), tiny_tokenizer(), settings(**options)).synthesize(TEXT, output_dir)


def slowly(output_dir: str) -> None:
    """With time to be killed between what is written and its name."""
    os.fsync = lambda descriptor: time.sleep(0.01)
    synthesize(output_dir)


def together(output_dir: str, number: int, rank: int, port: int) -> None:
    """As one of two processes that a launcher started; says in `rank-N.json` what it wrote and scored, and what it got."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_USE_CPU="true")
    told = {**at_once(output_dir, number)}
    (Path(output_dir) / f"rank-{rank}.json").write_text(json.dumps(told))


def at_once(output_dir: str, number: int, answer: str | None = None) -> dict[str, Any]:
    """A run that notes what it writes itself; into a file if `answer` names one."""
    write, written = ConversationFolder.write, []

    def noted(self: ConversationFolder, stage: str, part: Any, *args: Any) -> None:
        time.sleep(0.05)  # so that the other one has its turn too
        written.append(f"{stage}/{part}")
        write(self, stage, part, *args)

    ConversationFolder.write = noted
    try:
        made = synthesize(output_dir, num_conversations=number)
    finally:
        ConversationFolder.write = write
    told = {"written": written, "input_ids": made["input_ids"][:]}
    if answer is not None:
        Path(answer).write_text(json.dumps(told))
    return told
