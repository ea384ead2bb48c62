"""A real vLLM as engine: its tokens and log-probabilities are those of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (it needs an environment of its own)")

from peft_cartridges.self_study import SelfStudySynthesizer, TransformersEngine, VLLMEngine
from peft_cartridges.self_study.dispatch import Dispatcher
from peft_cartridges.self_study.engines import Outcome, Request
from tests.self_study import runs
from tests.serving.models import save_base, save_cartridge
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

TOKENIZER = tiny_tokenizer()
# Engines have kernels for certain head sizes only.
SHAPE = {"hidden_size": 256, "intermediate_size": 128, "head_dim": 64}
CONTEXTS = [tuple(token_ids(40, seed=seed).tolist()) for seed in (4, 5)]
PROMPTS = [token_ids(length, seed=length).tolist() for length in (3, 7, 5, 6)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> VLLMEngine:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    folder = tmp_path_factory.mktemp("model")
    tiny_model(**SHAPE).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return VLLMEngine(str(folder), TOKENIZER, top_k=5, dtype="float32", enforce_eager=True, max_model_len=512)


class _Requests:
    def __init__(self, requests: list[Request]) -> None:
        self.requests, self.found = requests, {}

    @property
    def finished(self) -> bool:
        return len(self.found) == len(self.requests)

    def begin(self) -> list[Request]:
        return list(self.requests)

    def receive(self, outcome: Outcome) -> list[Request]:
        self.found[outcome.request] = outcome.generation
        return []


def _run(engine: Any, requests: list[Request]) -> list[Any]:
    jobs = [_Requests([one for one in requests if one.context == context]) for context in CONTEXTS]
    Dispatcher([engine]).run(jobs, lambda job: None)
    return [job.found[request] for request in requests for job in jobs if request in job.found]


def _requests(temperature: float = 0.0) -> list[Request]:
    return [Request(context, prompt, 6, temperature, 7) for prompt in PROMPTS for context in CONTEXTS]


def test_tokens_and_targets_are_those_of_transformers(engine: VLLMEngine) -> None:
    model, requests = tiny_model(**SHAPE), _requests()
    found = _run(engine, requests)
    expected = _run(TransformersEngine(model, TOKENIZER), _requests())
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    rows = [[*request.prompt, *one.token_ids] for request, one in zip(requests, expected, strict=True)]
    scored = _run(
        engine,
        [
            Request(request.context, row, scored=len(one.token_ids))
            for request, row, one in zip(requests, rows, expected, strict=True)
        ],
    )
    for request, row, one, again in zip(requests, rows, found, scored, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([[*request.context, *row]])).logits[0].log_softmax(-1)
        exact = logprobs[-len(one.token_ids) - 1 : -1].topk(5)
        for mine in (one.top_k, again.top_k):
            np.testing.assert_array_equal(mine.token_ids, exact.indices.numpy())
            np.testing.assert_allclose(mine.logprobs, exact.values.numpy(), atol=1e-3)


def test_log_probabilities_are_those_before_the_temperature(engine: VLLMEngine) -> None:
    requests = _requests(temperature=0.5)
    warm = _run(engine, requests)
    assert [one.token_ids for one in warm] == [one.token_ids for one in _run(engine, _requests(temperature=0.5))]
    rows = [
        Request(request.context, [*request.prompt, *one.token_ids], scored=len(one.token_ids))
        for request, one in zip(requests, warm, strict=True)
    ]
    for one, again in zip(warm, _run(engine, rows), strict=True):
        np.testing.assert_allclose(one.top_k.logprobs, again.top_k.logprobs, atol=1e-3)


@pytest.mark.parametrize("targets", ["top_k", "hidden_states", "live"])
def test_a_set_is_made_and_carried_on(engine: VLLMEngine, tmp_path: Path, targets: str) -> None:
    args = runs.settings(
        num_conversations=8, conversations_per_chunk=4, recitation_share=0.5, teacher_targets=targets, teacher_top_k=5,
        num_rounds=2,
    )  # fmt: skip
    model = tiny_model(**SHAPE) if targets == "hidden_states" else None
    synthesizer = SelfStudySynthesizer(model, TOKENIZER, args, engines=engine)
    dataset = synthesizer.synthesize(runs.TEXT, tmp_path)
    assert len(dataset) == 8
    for row in dataset if targets == "top_k" else ():
        assert len(row["teacher_top_k_ids"]) == len(row["teacher_top_k_logprobs"]) == 5 * sum(row["completion_mask"])
    for row in dataset if targets == "hidden_states" else ():
        assert len(row["teacher_hidden_states"]) == SHAPE["hidden_size"] * sum(row["completion_mask"])
    assert dataset.to_dict() == synthesizer.synthesize(runs.TEXT, tmp_path).to_dict()


# The last one here: its end takes down what vLLM holds in this process for the engine above.
def test_the_offline_engine_with_cartridges_writes_as_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_cartridges.serving import CartridgeLLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # a process has room for one engine
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    save_base(tmp_path / "base")
    cartridge = save_cartridge(tmp_path / "c", tiny_model(**SHAPE), 37, seed=3, base=str(tmp_path / "base"))
    llm = CartridgeLLM(str(tmp_path / "base"), {"handbook": cartridge}, **options)
    found = _run(VLLMEngine(llm, llm.get_tokenizer(), top_k=5), _requests())
    expected = _run(TransformersEngine(tiny_model(**SHAPE), TOKENIZER), _requests())
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    settings = runs.settings(num_conversations=4, conversations_per_chunk=4, teacher_targets="live")
    synthesizer = SelfStudySynthesizer(None, TOKENIZER, settings, engines=VLLMEngine(llm, TOKENIZER))
    assert len(synthesizer.synthesize(runs.TEXT, tmp_path / "set")) == 4
