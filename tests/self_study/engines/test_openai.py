"""Servers as engines: their tokens and log-probabilities are the model's, and their troubles end in an error or none."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("openai")

from peft_cartridges import SelfStudySynthesizer, load_self_study
from peft_cartridges.conversations import read_report
from peft_cartridges.self_study import EngineError, OpenAIEngine, TransformersEngine, dispatch
from peft_cartridges.self_study.dispatch import Dispatcher
from peft_cartridges.self_study.engines import Outcome, Request, openai
from peft_cartridges.self_study.engines.openai import ServerTokens
from peft_cartridges.self_study.scoring import ModelScorer
from tests.self_study import runs
from tests.self_study.completions_server import CompletionsServer, Trouble
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

TOKENIZER = tiny_tokenizer()
CONTEXT = tuple(token_ids(20, seed=4).tolist())
PROMPTS = [token_ids(length, seed=length).tolist() for length in (3, 7, 5, 6)]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "_FIRST_WAIT", 0.001)


class _Requests:
    """Some requests of one context, and what came of them in order."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests, self.found = requests, {}

    @property
    def finished(self) -> bool:
        return len(self.found) == len(self.requests)

    def begin(self) -> list[Request]:
        return list(self.requests)

    def receive(self, outcome: Outcome) -> list[Request]:
        assert outcome.request not in self.found, "answered twice"
        self.found[outcome.request] = outcome.generation
        return []

    def results(self) -> list[Any]:
        return [self.found[request] for request in self.requests]


def _engine(url: str, **options: Any) -> OpenAIEngine:
    return OpenAIEngine(url, "tiny", TOKENIZER, **{"top_k": 5, "max_retries": 3, **options})


def _run(engines: Any, requests: list[Request] | None = None) -> list[Any]:
    requests = requests or [Request(CONTEXT, prompt, 6, 0.0, seed) for seed, prompt in enumerate(PROMPTS)]
    job = _Requests(requests)
    Dispatcher(engines if isinstance(engines, list) else [engines]).run([job], lambda job: None)
    return job.results()


@pytest.mark.parametrize("options", [{}, {"token_ids": False}])
def test_tokens_and_targets_are_those_of_the_model(options: dict[str, bool]) -> None:
    model = tiny_model()
    with CompletionsServer(token_ids=not options).running() as url:
        server = _engine(url, **options)
        found, expected = _run(server), _run(TransformersEngine(model, TOKENIZER))
        rows = [[*prompt, *one.token_ids] for prompt, one in zip(PROMPTS, expected, strict=True)]
        scored = [Request(CONTEXT, row, scored=len(one.token_ids)) for row, one in zip(rows, expected, strict=True)]
        echoed = _run(server, scored)
    for one, other, row, echo in zip(found, expected, rows, echoed, strict=True):
        assert one.token_ids == other.token_ids
        logits = model(torch.tensor([[*CONTEXT, *row]])).logits[0]
        logprobs = logits.log_softmax(-1)[-len(one.token_ids) - 1 : -1].topk(5)
        for mine in (one.top_k, echo.top_k):
            np.testing.assert_array_equal(mine.token_ids, logprobs.indices.numpy())
            np.testing.assert_allclose(mine.logprobs, logprobs.values.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("trouble", [500, 503, 429, 408, "garbage", "nothing", "cut", "hang up"])
def test_troubles_that_pass_are_overcome(trouble: Any) -> None:
    with CompletionsServer().running() as url:
        calm = [one.token_ids for one in _run(_engine(url))]
    with CompletionsServer(lambda number: trouble if number in (0, 2, 3) else None).running() as url:
        engine = _engine(url)
        assert [one.token_ids for one in _run(engine)] == calm
        assert engine.retries == 3


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (500, r"gave status 500: .*out of luck.*, 4 times in a row\. What is finished is kept"),
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
    with server.running() as url, pytest.raises(EngineError, match=message):
        _run(_engine(url, concurrency=1))
    assert server.requests == (1 if trouble in (401, 404) else 4), "a refusal is not sent again, anything else is"


def test_a_server_that_is_not_there_is_named() -> None:
    with CompletionsServer().running() as url:
        pass
    with pytest.raises(EngineError, match=rf"The server at {url} gave no answer"):
        _run(_engine(url, max_retries=1))


def test_no_more_requests_than_allowed_are_under_way() -> None:
    server = CompletionsServer()
    with server.running() as url:
        _run(_engine(url, concurrency=2))
    assert server.most_under_way <= 2 and server.requests == 4


def test_a_strict_server_without_token_ids_is_told_about() -> None:
    with CompletionsServer(token_ids=False).running() as url, pytest.raises(EngineError, match="unknown field"):
        _run(_engine(url))


def test_a_request_that_a_server_refuses_though_it_answers_others_is_given_up_alone() -> None:
    server = CompletionsServer(lambda number: 400 if number == 2 else None)
    with server.running() as url:
        found = _run(_engine(url, concurrency=1))
    assert [one is None for one in found] == [False, False, True, False] and server.requests == 4


# -- several of them ---------------------------------------------------------------------------------------------------


def test_work_goes_to_whoever_is_free() -> None:
    requests = [Request(CONTEXT, prompt, 6, 1.0, seed) for seed, prompt in enumerate(PROMPTS * 6)]
    first, second = CompletionsServer(), CompletionsServer()
    with first.running() as one, second.running() as other:
        alone = _run(_engine(one), requests)
        first.requests = 0
        together = _run([_engine(one, concurrency=2), _engine(other, concurrency=2)], requests)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert min(first.requests, second.requests) >= 6 and first.requests + second.requests == len(requests)


def test_a_server_that_dies_is_left_out_and_nothing_is_lost() -> None:
    requests = [Request(CONTEXT, prompt, 6, 1.0, seed) for seed, prompt in enumerate(PROMPTS * 4)]
    ill = CompletionsServer(lambda number: "hang up" if number >= 2 else None)
    with CompletionsServer().running() as well, ill.running() as url:
        expected = [one.token_ids for one in _run(_engine(well), requests)]
        engines = [_engine(url, max_retries=0, concurrency=2), _engine(well, concurrency=1)]
        with pytest.warns(UserWarning, match=rf"The server at {url} gave no answer .* The others go on"):
            found = _run(engines, requests)
    assert [one.token_ids for one in found] == expected


def test_what_a_server_that_hangs_was_given_is_put_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_PATIENCE", 0.2)
    released = threading.Event()

    def hangs(number: int) -> None:
        released.wait(60)

    requests = [Request(CONTEXT, prompt, 6, 1.0, seed) for seed, prompt in enumerate(PROMPTS * 3)]
    with CompletionsServer().running() as well, CompletionsServer(hangs).running() as url:
        expected = [one.token_ids for one in _run(_engine(well), requests)]
        found = _run([_engine(url, concurrency=2), _engine(well, concurrency=2)], requests)
        released.set()
    assert [one.token_ids for one in found] == expected


def test_ctrl_c_ends_at_once_though_a_server_hangs(tmp_path: Path) -> None:
    released = threading.Event()
    with CompletionsServer(lambda number: released.wait(60)).running() as url:
        script = (
            "import signal\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in a shell's background jobs
            "from tests.self_study.engines.test_openai import _engine, _run\n"
            "print('asking', flush=True)\n"
            f"_run(_engine({url!r}, timeout=50))\n"
        )
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0  # the server hangs for 60 seconds, the client waits for 50
        released.set()


# -- whole runs --------------------------------------------------------------------------------------------------------


def _synthesize(url: str, folder: Path | None, **options: Any) -> Any:
    settings = {"num_conversations": 16, "recitation_share": 0.5, "teacher_targets": "top_k", "teacher_top_k": 5}
    args = runs.settings(**{**settings, **options})
    return SelfStudySynthesizer(None, TOKENIZER, args, engines=_engine(url)).synthesize(runs.TEXT, folder)


def test_a_server_that_dies_half_way_loses_nothing(tmp_path: Path) -> None:
    with CompletionsServer().running() as url:
        unbroken = _synthesize(url, None)

    def dies(number: int) -> Any:
        return "hang up" if number >= 14 else None

    with (
        CompletionsServer(dies).running() as url,
        pytest.raises(EngineError, match="run the same command again"),
    ):
        _synthesize(url, tmp_path)
    finished = set((tmp_path / "written").glob("*.arrow"))
    assert 1 <= len(finished) < 8
    with pytest.warns(UserWarning, match="has not ended: . parts are finished"):
        load_self_study(tmp_path)
    server = CompletionsServer(_every(5))
    with server.running() as url:
        resumed = _synthesize(url, tmp_path)
    assert resumed.to_dict() == unbroken.to_dict()
    assert set(resumed["seed_type"]) > {"recitation"}
    assert not any("teacher_hidden_states" in name for name in resumed.column_names)


def _every(n: int) -> Trouble:
    return lambda number: 500 if number % n == 0 else None


def test_what_a_server_wrote_is_scored_exactly_by_the_model(tmp_path: Path) -> None:
    model, args = tiny_model(), runs.settings(num_conversations=8, recitation_share=0.5)
    server = CompletionsServer()
    with server.running() as url:
        engine = _engine(url, top_k=0)
        dataset = SelfStudySynthesizer(model, TOKENIZER, args, engines=engine).synthesize(runs.TEXT, tmp_path)
    assert read_report(dataset)["report"]["kept"] == 8 and server.requests == 8, "nothing was sent to be scored"
    local = SelfStudySynthesizer(model, TOKENIZER, args)
    live = load_self_study(tmp_path, targets="live")
    states = ModelScorer(model, local.codec, args)._states(live.to_list())
    for row, exact in zip(dataset, states, strict=True):
        np.testing.assert_allclose(row["teacher_hidden_states"], exact.numpy().reshape(-1), atol=2e-3)


def test_nothing_is_asked_for_beyond_the_tokens_where_the_teacher_is_live() -> None:
    server = CompletionsServer()
    with server.running() as url:
        args = runs.settings(
            num_conversations=8, recitation_share=0.5, teacher_targets="live", engine="openai", engine_model="tiny",
            base_url=[url, url],
        )  # fmt: skip
        dataset = SelfStudySynthesizer(None, TOKENIZER, args).synthesize(runs.TEXT)
    assert len(dataset) == 8 and server.requests == 8 and set(server.logprobs) == {1}
    assert not any(name.startswith("teacher_") for name in dataset.column_names)


def test_prompts_can_be_sent_as_text() -> None:
    server = CompletionsServer()
    with server.running() as url:
        _run(_engine(url, text_prompts=True, concurrency=1))
    assert server.prompts == [TOKENIZER.decode([*CONTEXT, *prompt]) for prompt in PROMPTS]


def test_hidden_states_are_not_what_a_server_gives() -> None:
    with pytest.raises(ValueError, match=r'`teacher_targets` is "hidden_states", which engines do not give'):
        SelfStudySynthesizer(None, TOKENIZER, runs.settings(), engines=_engine("http://localhost:1"))


def test_more_log_probabilities_than_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match="`teacher_top_k` is 9, but"):
        _synthesize("http://localhost:1", None, teacher_top_k=9)


def test_usefulness_is_measured_by_the_server_too() -> None:
    with CompletionsServer().running() as url:
        dataset = _synthesize(url, None, num_conversations=4, recitation_share=0.0, oversampling=2.0)
    assert len(dataset) == 4 and all(value > 0 for value in dataset["usefulness"])


def test_tokens_are_looked_up_by_any_name() -> None:
    tokens = ServerTokens(TOKENIZER)
    assert [tokens.look_up(name) for name in ("token_id:9", "captain", "<eos>")] == [9, 20, 2]
    assert [tokens.look_up(name) for name in ("token_id:x", "nowhere")] == [None, None]


def test_of_a_long_echo_only_what_is_wanted_is_read() -> None:
    engine, length, number = _engine("http://localhost:1"), 400, 7
    looked_up = []
    look_up = engine._tokens.look_up
    engine._tokens.look_up = lambda token: looked_up.append(token) or look_up(token)
    tables = [{f"token_id:{8 + rank}": -float(rank + 1) for rank in range(5)} for _ in range(length)]
    row = [9] * length
    choice = {"logprobs": {"tokens": ["token_id:9"] * length, "top_logprobs": tables}}
    found = engine._read_echo(Request((), row, scored=number), choice)
    assert len(found.top_k) == number and len(looked_up) == number * 6


def test_warnings_are_none_where_all_is_well() -> None:
    with CompletionsServer().running() as url, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(_run(_engine(url))) == len(PROMPTS)


@pytest.mark.parametrize("where", ["{url}", "127.0.0.1:1/v1", "http://no-such-host.invalid/v1"])
def test_a_server_that_is_not_there_is_found_out_before_anything_is_written(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai, "_FIRST_WAIT", 30.0)  # of the tries that a server is worth that was there
    with CompletionsServer().running() as url:
        pass
    engines = [_engine(where.format(url=url)) for _ in range(2)]
    synthesizer = SelfStudySynthesizer(None, TOKENIZER, runs.settings(teacher_targets="live"), engines=engines)
    for make in (synthesizer.preview, synthesizer.check, lambda text: synthesizer.synthesize(text, tmp_path / "set")):
        with pytest.raises(EngineError, match=r"`base_url`: the server at .* cannot be reached .*Start it"):
            make(runs.TEXT)
    assert not (tmp_path / "set").exists()


def test_one_server_that_is_there_is_enough_and_a_finished_set_needs_none(tmp_path: Path) -> None:
    with CompletionsServer().running() as gone:
        pass
    with CompletionsServer().running() as url:
        engines = [_engine(gone, max_retries=0), _engine(url)]
        synthesizer = SelfStudySynthesizer(None, TOKENIZER, runs.settings(teacher_targets="live"), engines=engines)
        with pytest.warns(UserWarning, match="The others go on without it"):
            written = synthesizer.synthesize(runs.TEXT, tmp_path)
    assert synthesizer.synthesize(runs.TEXT, tmp_path).to_dict() == written.to_dict()
    synthesizer.check(runs.TEXT, tmp_path)
