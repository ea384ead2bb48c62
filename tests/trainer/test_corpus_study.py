"""What a trainer makes of its corpus before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from peft_cartridges.self_study.engines import ENGINES
from tests.trainer.small_runs import TEXT, make_trainer


def test_a_window_that_is_too_small_is_said_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, max_chunk_tokens=360, min_chunk_tokens=350, max_answer_tokens=400)
    monkeypatch.setattr(trainer.model, "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match="the model's window has 512: lower `max_chunk_tokens`"):
        trainer.train()
    assert not (tmp_path / "_conversations").exists()


@pytest.mark.parametrize("resample_every", [0, 2])
def test_an_engine_is_made_once_for_all_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resample_every: int
) -> None:
    """vLLM in this process loads a model each time that it is made."""
    made = []

    def make(args: Any, model: Any, codec: Any, top_k: int) -> Any:
        made.append(1)
        return ENGINES["transformers"](args, model, codec, top_k)

    monkeypatch.setitem(ENGINES, "vllm", make)
    trainer = make_trainer(tmp_path, engine="vllm", num_eval_conversations=4, resample_every=resample_every)
    trainer.train()
    assert trainer.state.global_step == 4 and len(made) == 1


def test_rounds_of_another_corpus_are_left_alone_and_none_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"resample_every": 1, "max_steps": 2}
    stopped = make_trainer(tmp_path, **options)
    step, last = stopped.training_step, "_conversations"

    def stop(*args: Any, **kwargs: Any) -> Any:
        if stopped.state.global_step == 1:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(stopped, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    (left,) = (tmp_path / last).iterdir()
    assert left.name.endswith("-round-1")
    other = make_trainer(tmp_path, dataset=Dataset.from_dict({"text": [TEXT + " the end ."]}), **options)
    other.train()
    assert other.state.global_step == 2 and list((tmp_path / last).iterdir()) == [left]
    # A run that is carried on takes up its own round.
    make_trainer(tmp_path, **options).train()
    assert not list((tmp_path / last).iterdir())
