"""A server as teacher: its tokens and log-probabilities are the model's, and its troubles end in an error or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openai")

from peft_cartridges.self_study.backends import BackendError, OpenAIBackend, TransformersBackend, openai_backend
from peft_cartridges.self_study.backends.server_tokens import ServerTokens

from peft_cartridges import SelfStudySynthesizer
from tests.self_study import runs
from tests.self_study.completions_server import CompletionsServer, Trouble
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

TOKENIZER = tiny_tokenizer()
CONTEXT = token_ids(20, seed=4).tolist()
PROMPTS = [token_ids(length, seed=length).tolist() for length in (3, 7, 5, 6)]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_backend, "_FIRST_WAIT", 0.001)


def _backend(url: str, **options: Any) -> OpenAIBackend:
    return OpenAIBackend(url, "tiny", TOKENIZER, **{"top_k": 5, "max_retries": 3, **options})


def _generate(backend: Any) -> list[Any]:
    with backend.in_context(CONTEXT) as session:
        return session.generate(PROMPTS, max_new_tokens=6, temperature=0.0, seeds=[1, 2, 3, 4])


@pytest.mark.parametrize("options", [{}, {"token_ids": False}])
def test_tokens_and_targets_are_those_of_the_model(options: dict[str, bool]) -> None:
    local = TransformersBackend(tiny_model(), TOKENIZER)
    with CompletionsServer(token_ids=not options).running() as url:
        server = _backend(url, **options)
        found, expected = _generate(server), _generate(local)
        rows = [prompt + one.token_ids for prompt, one in zip(PROMPTS, expected, strict=True)]
        lengths = [len(one.token_ids) for one in expected]
        with local.in_context(CONTEXT) as session:
            exact = [local.top_k(targets, 5, 1.0) for targets in session.targets(rows, lengths)]
        with server.in_context(CONTEXT) as session:
            echoed = session.targets(rows, lengths)
    for one, other, targets, echo in zip(found, expected, exact, echoed, strict=True):
        assert one.token_ids == other.token_ids
        for mine in (one.top_k, echo):
            np.testing.assert_array_equal(mine.token_ids, targets.token_ids)
            np.testing.assert_allclose(mine.logprobs, targets.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    "trouble",
    [500, 503, 429, 408, "garbage", "nothing", "cut", "hang up"],
)
def test_troubles_that_pass_are_overcome(trouble: Any) -> None:
    with CompletionsServer().running() as url:
        calm = [one.token_ids for one in _generate(_backend(url))]
    with CompletionsServer(lambda number: trouble if number in (0, 2, 3) else None).running() as url:
        backend = _backend(url)
        assert [one.token_ids for one in _generate(backend)] == calm
        assert backend.retries == 3


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (500, r"gave status 500: .*out of luck.*, 4 times in a row\. Finished chunks are kept"),
        (429, "gave status 429"),
        ("garbage", "gave an answer that is no completion"),
        ("nothing", "gave an answer that is no completion .*without choices"),
        ("hang up", r"gave no answer \("),
        (401, r"refused a request \(status 401: .*out of luck"),
        (404, r"refused a request \(status 404"),
    ],
)
def test_troubles_that_stay_end_in_a_clear_error(trouble: Any, message: str) -> None:
    server = CompletionsServer(lambda number: trouble)
    with server.running() as url, pytest.raises(BackendError, match=message):
        _generate(_backend(url, concurrency=1))
    assert server.requests == (1 if trouble in (401, 404) else 4), "a refusal is not sent again, anything else is"


def test_a_server_that_is_not_there_is_named() -> None:
    with CompletionsServer().running() as url:
        pass
    with pytest.raises(BackendError, match=rf"The server at {url} gave no answer"):
        _generate(_backend(url, max_retries=1))


def test_no_more_requests_than_allowed_are_under_way() -> None:
    server = CompletionsServer()
    with server.running() as url:
        _generate(_backend(url, concurrency=2))
    assert server.most_under_way <= 2 and server.requests == 4


def test_a_strict_server_without_token_ids_is_told_about() -> None:
    with CompletionsServer(token_ids=False).running() as url, pytest.raises(BackendError, match="unknown field"):
        _generate(_backend(url))


def _synthesize(url: str, folder: Path | None) -> Any:
    args = runs.settings(num_conversations=16, recitation_share=0.5, teacher_targets="top_k", teacher_top_k=5)
    return SelfStudySynthesizer(None, TOKENIZER, args, backend=_backend(url)).synthesize(runs.TEXT, folder)


def test_a_server_that_dies_half_way_loses_nothing(tmp_path: Path) -> None:
    with CompletionsServer().running() as url:
        unbroken = _synthesize(url, None)

    def dies(number: int) -> Any:
        return "hang up" if number >= 14 else None

    with CompletionsServer(dies).running() as url, pytest.raises(BackendError, match="run the same command again"):
        _synthesize(url, tmp_path)
    finished = set((tmp_path / "shards").glob("*.arrow"))
    assert 1 <= len(finished) < 8
    server = CompletionsServer(_every(5))
    with server.running() as url:
        resumed = _synthesize(url, tmp_path)
    assert resumed.to_dict() == unbroken.to_dict()
    assert set(resumed["seed_type"]) > {"recitation"}
    assert not any("teacher_hidden_states" in name for name in resumed.column_names)


def _every(n: int) -> Trouble:
    return lambda number: 500 if number % n == 0 else None


def test_prompts_can_be_sent_as_text() -> None:
    server = CompletionsServer()
    with server.running() as url:
        _generate(_backend(url, text_prompts=True, concurrency=1))
    assert server.prompts == [TOKENIZER.decode(CONTEXT + prompt) for prompt in PROMPTS]


def test_hidden_states_are_not_what_a_server_gives() -> None:
    with pytest.raises(ValueError, match="OpenAIBackend gives top_k only"):
        SelfStudySynthesizer(None, TOKENIZER, runs.settings(), backend=_backend("http://localhost:1"))


def test_more_log_probabilities_than_asked_for_are_refused() -> None:
    args = runs.settings(teacher_targets="top_k", teacher_top_k=9, num_conversations=2)
    with CompletionsServer().running() as url, pytest.raises(ValueError, match="`teacher_top_k` is 9, but"):
        SelfStudySynthesizer(None, TOKENIZER, args, backend=_backend(url)).synthesize(runs.TEXT)


def test_usefulness_is_measured_by_the_server_too() -> None:
    args = runs.settings(teacher_targets="top_k", teacher_top_k=5, num_conversations=4, oversampling=2.0)
    with CompletionsServer().running() as url:
        dataset = SelfStudySynthesizer(None, TOKENIZER, args, backend=_backend(url)).synthesize(runs.TEXT)
    assert len(dataset) == 4 and all(value > 0 for value in dataset["usefulness"])


def test_tokens_are_looked_up_by_any_name() -> None:
    tokens = ServerTokens(TOKENIZER)
    assert [tokens.look_up(name) for name in ("token_id:9", "captain", "<eos>")] == [9, 20, 2]
    assert [tokens.look_up(name) for name in ("token_id:x", "nowhere")] == [None, None]
