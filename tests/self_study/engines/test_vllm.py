"""A real vLLM as teacher: its tokens and log-probabilities are those of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (it needs an environment of its own)")

from peft_cartridges.self_study import SelfStudySynthesizer
from peft_cartridges.self_study.backends import TransformersBackend, VLLMBackend
from tests.self_study import runs
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

TOKENIZER = tiny_tokenizer()
# Engines have kernels for certain head sizes only.
SHAPE = {"hidden_size": 256, "intermediate_size": 128, "head_dim": 64}
CONTEXT = token_ids(40, seed=4).tolist()
PROMPTS = [token_ids(length, seed=length).tolist() for length in (3, 7, 5, 6)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> VLLMBackend:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    folder = tmp_path_factory.mktemp("model")
    tiny_model(**SHAPE).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return VLLMBackend(str(folder), TOKENIZER, top_k=5, dtype="float32", enforce_eager=True, max_model_len=512)


def _generate(backend: Any, temperature: float = 0.0) -> list[Any]:
    with backend.in_context(CONTEXT) as session:
        return session.generate(PROMPTS, max_new_tokens=6, temperature=temperature, seeds=[1, 2, 3, 4])


def test_tokens_and_targets_are_those_of_transformers(engine: VLLMBackend) -> None:
    local = TransformersBackend(tiny_model(**SHAPE), TOKENIZER)
    found, expected = _generate(engine), _generate(local)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    rows = [prompt + one.token_ids for prompt, one in zip(PROMPTS, expected, strict=True)]
    lengths = [len(one.token_ids) for one in expected]
    with local.in_context(CONTEXT) as session:
        exact = [local.top_k(targets, 5, 1.0) for targets in session.targets(rows, lengths)]
    with engine.in_context(CONTEXT) as session:
        scored = session.targets(rows, lengths)
    for one, targets, again in zip(found, exact, scored, strict=True):
        for mine in (one.top_k, again):
            np.testing.assert_array_equal(mine.token_ids, targets.token_ids)
            np.testing.assert_allclose(mine.logprobs, targets.logprobs, atol=1e-3)


def test_log_probabilities_are_those_before_the_temperature(engine: VLLMBackend) -> None:
    warm = _generate(engine, temperature=0.5)
    assert [one.token_ids for one in warm] == [one.token_ids for one in _generate(engine, temperature=0.5)]
    rows = [prompt + one.token_ids for prompt, one in zip(PROMPTS, warm, strict=True)]
    with engine.in_context(CONTEXT) as session:
        scored = session.targets(rows, [len(one.token_ids) for one in warm])
    for one, again in zip(warm, scored, strict=True):
        np.testing.assert_allclose(one.top_k.logprobs, again.logprobs, atol=1e-3)


def test_a_data_set_is_made(engine: VLLMBackend, tmp_path: Path) -> None:
    args = runs.settings(
        num_conversations=8, conversations_per_chunk=4, recitation_share=0.5, teacher_targets="top_k", teacher_top_k=5,
        num_rounds=2, min_usefulness=1e-6,
    )  # fmt: skip
    synthesizer = SelfStudySynthesizer(None, TOKENIZER, args, backend=engine)
    dataset = synthesizer.synthesize(runs.TEXT, tmp_path)
    for row in dataset:
        assert len(row["teacher_top_k_ids"]) == len(row["teacher_top_k_logprobs"]) == 5 * sum(row["completion_mask"])
    assert dataset.to_dict() == synthesizer.synthesize(runs.TEXT).to_dict()
