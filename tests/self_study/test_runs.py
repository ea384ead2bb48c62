"""Runs that are killed, carried on, shared among processes and repeated: always the same data set."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from peft_cartridges import load_self_study
from peft_cartridges.conversations import ConversationFolder, Part, read_provenance, read_report
from peft_cartridges.conversations.folder import WRITTEN, cover
from peft_cartridges.corpus import Document
from peft_cartridges.self_study import scoring
from tests.self_study import runs

STAGES = ("written", "hidden_states")


@pytest.fixture(scope="module")
def unbroken() -> Dataset:
    return runs.synthesize(None)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.self_study.runs"])
    return context


def _shards(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for stage in STAGES for path in (folder / stage).glob("*.arrow")}


def assert_same(one: Dataset, other: Dataset) -> None:
    assert one.features == other.features
    assert one.to_dict() == other.to_dict()
    assert read_report(one)["report"] == read_report(other)["report"]


def test_a_run_killed_ten_times_loses_and_repeats_nothing(tmp_path: Path, unbroken: Dataset, processes: Any) -> None:
    rng, finished = random.Random(0), {}
    for _ in range(10):
        process = processes.Process(target=runs.slowly, args=(str(tmp_path),))
        process.start()
        wanted, deadline = len(finished) + rng.randint(1, 4), time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if len(_shards(tmp_path)) >= wanted:
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        assert process.is_alive(), "the run was over before it was killed"
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        now = _shards(tmp_path)
        assert finished.items() <= now.items(), "a finished chunk was lost or made again"
        finished = now
    assert 10 <= len(finished) < 90
    resumed = runs.synthesize(tmp_path)
    assert finished.items() <= _shards(tmp_path).items()
    assert_same(resumed, unbroken)


def test_a_finished_run_is_read_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.synthesize(tmp_path, num_conversations=6)
    monkeypatch.setattr("peft_cartridges.self_study.synthesizer.PartStudy.receive", None)
    monkeypatch.setattr("peft_cartridges.self_study.synthesizer.ModelScorer.score", None)
    assert_same(runs.synthesize(tmp_path, num_conversations=6), first)


def test_the_same_seed_gives_the_same_data_set_and_another_seed_another(unbroken: Dataset) -> None:
    assert_same(runs.synthesize(None), unbroken)
    other = runs.synthesize(None, num_conversations=20, synthesis_seed=1)
    assert other["input_ids"] != unbroken["input_ids"][: len(other)]


def test_the_batch_size_changes_nothing(unbroken: Dataset) -> None:
    one_by_one = runs.synthesize(None, num_conversations=40, generation_batch_size=1)
    assert one_by_one["input_ids"] == unbroken["input_ids"][: len(one_by_one)]


def test_two_processes_give_the_same_as_one(tmp_path: Path, processes: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        processes.Process(target=runs.together, args=(str(tmp_path), 14, rank, port), daemon=True) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    alone = runs.synthesize(None, num_conversations=14)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert_shared(first["written"], second["written"], 14)
    assert first["input_ids"] == second["input_ids"] == alone["input_ids"]
    assert_same(runs.synthesize(tmp_path, num_conversations=14), alone)


def assert_shared(one: list[str], other: list[str], number: int) -> None:
    assert one and other, "one of them did it all"
    assert len(one) + len(other) == len({*one, *other}) == number, "something was made twice, or not at all"


def test_two_jobs_in_one_folder_share_the_work(tmp_path: Path, processes: Any) -> None:
    answers = [str(tmp_path / f"job-{number}.json") for number in range(2)]
    folder = str(tmp_path / "set")
    started = [processes.Process(target=runs.at_once, args=(folder, 14, name), daemon=True) for name in answers]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    first, second = (json.loads(Path(name).read_text()) for name in answers)
    assert_shared(first["written"], second["written"], 14)
    assert first["input_ids"] == second["input_ids"] == runs.synthesize(None, num_conversations=14)["input_ids"]


def test_a_part_that_somebody_else_has_claimed_is_not_made_and_its_files_are_left_alone(tmp_path: Path) -> None:
    mine, other = ConversationFolder(tmp_path), ConversationFolder(tmp_path)
    part, rows = Part(1, 0, 2), runs.synthesize(None, num_conversations=2)
    with mine.claimed(WRITTEN, part) as claimed, other.claimed(WRITTEN, part) as refused:
        assert claimed and not refused
        mine.write(WRITTEN, part, rows, {})
    with other.claimed(WRITTEN, part) as again:
        assert not again, "it is there"
    assert mine.parts(WRITTEN) == [part] and not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("number", [9, 7])
def test_a_set_is_extended_and_what_was_there_is_kept(tmp_path: Path, number: int) -> None:
    runs.synthesize(tmp_path, num_conversations=number)
    before = _shards(tmp_path)
    larger = runs.synthesize(tmp_path, num_conversations=20)
    assert before.items() <= _shards(tmp_path).items()
    assert larger["input_ids"] == runs.synthesize(None, num_conversations=20)["input_ids"]
    assert read_report(larger)["report"]["made"] == read_report(load_self_study(tmp_path))["report"]["made"]
    # And a smaller one is a part of it, of which nothing is made anew.
    smaller = runs.synthesize(tmp_path, num_conversations=number)
    assert len(smaller) == number and smaller["input_ids"] == larger["input_ids"][:number]


def test_parts_that_overlap_are_read_once() -> None:
    parts = [Part(0, 0, 4), Part(1, 0, 2), Part(1, 0, 4), Part(1, 2, 4), Part(2, 2, 4)]
    assert cover(parts) == [Part(0, 0, 4), Part(1, 0, 4)]


@pytest.mark.parametrize(
    "change",
    [
        {"generation_batch_size": 1}, {"refill_finished_rows": False}, {"num_conversations": 6},
        {"teacher_targets": "top_k"}, {"teacher_top_k": 3}, {"concurrency": 2}, {"max_retries": 1},
    ],
)  # fmt: skip
def test_what_does_not_decide_the_content_is_no_part_of_the_address(change: dict[str, Any]) -> None:
    assert _address(**change) == _address()


@pytest.mark.parametrize(
    "change", [{"synthesis_seed": 7}, {"max_similarity": 0.5}, {"num_rounds": 2}, {"thoughts": "learn"}]
)
def test_what_decides_the_content_is(change: dict[str, Any]) -> None:
    assert _address(**change) != _address()


def _address(**change: Any) -> str:
    return runs.SelfStudySynthesizer(runs.tiny_model(), runs.tiny_tokenizer(), runs.settings(**change)).address(
        runs.TEXT
    )


def test_versions_are_kept_and_no_part_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _address()
    monkeypatch.setattr("peft_cartridges.conversations.provenance.version", lambda package: "9.9.9")
    assert _address() == before
    assert set(read_provenance(runs.synthesize(None, num_conversations=2))["versions"].values()) == {"9.9.9"}


def test_one_bad_value_is_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = runs.synthesize(None, num_conversations=8)
    predicting, bad = scoring.predicting_states, plain[3]["input_ids"]

    def broken(model: Any, rows: Any, spans: Any) -> Any:
        found = predicting(model, rows, spans)
        for row, states in zip(rows, found, strict=True):
            if row == bad[len(bad) - len(row) :]:
                states[0, 0] = 7e4
        return found

    monkeypatch.setattr(scoring, "predicting_states", broken)
    dataset = runs.synthesize(tmp_path, num_conversations=8)
    assert dataset["input_ids"] == [row for row in plain["input_ids"] if row != bad]
    assert read_report(dataset)["report"]["dropped"] == {"unstorable_targets": 1}
    # Nothing else was lost, and other targets have no trouble with it.
    assert len(runs.synthesize(tmp_path, num_conversations=8, teacher_targets="live")) == 8


def test_other_targets_are_computed_without_writing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = runs.synthesize(tmp_path, num_conversations=6, teacher_targets="live")
    assert not any(name.startswith("teacher_") for name in live.column_names)
    monkeypatch.setattr("peft_cartridges.self_study.synthesizer.PartStudy.receive", None)
    exact = runs.synthesize(tmp_path, num_conversations=6)
    top_k = runs.synthesize(tmp_path, num_conversations=6, teacher_targets="top_k", teacher_top_k=3)
    assert live["id"][:] == exact["id"][:] == top_k["id"][:]
    for targets, columns in (("live", live), ("hidden_states", exact), ("top_k", top_k), (None, exact)):
        assert load_self_study(tmp_path, targets=targets).column_names == columns.column_names
    monkeypatch.undo()
    at_once = runs.synthesize(None, num_conversations=6)
    for one, other in zip(exact, at_once, strict=True):
        assert one["teacher_hidden_states"] == other["teacher_hidden_states"]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    runs.synthesize(tmp_path, num_conversations=4)
    with pytest.raises(
        ValueError, match=r"`output_dir` .* holds another conversation set: synthesis_seed \(42 there, 7"
    ):
        runs.synthesize(tmp_path, num_conversations=4, synthesis_seed=7)


def test_a_folder_of_another_corpus_or_model_is_refused(tmp_path: Path) -> None:
    args = runs.settings(num_conversations=4)
    runs.synthesize(tmp_path, num_conversations=4)

    def again(model: Any, corpus: Any) -> None:
        runs.SelfStudySynthesizer(model, runs.tiny_tokenizer(), args).synthesize(corpus, tmp_path)

    with pytest.raises(ValueError, match=r"corpus \("):
        again(runs.tiny_model(), [Document("doc0", f"{runs.TEXT} the end .")])
    with pytest.raises(ValueError, match=r"model \("):
        again(runs.tiny_model(seed=1), runs.TEXT)


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    runs.synthesize(tmp_path, num_conversations=4)
    path = tmp_path / "self_study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(
        ValueError, match=r"`output_dir` .* another version .* \(format 1, this one has 3\): use another"
    ):
        runs.synthesize(tmp_path, num_conversations=4)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    runs.synthesize(tmp_path, num_conversations=4)
    shard = tmp_path / "hidden_states" / "part-000000-00000-00002.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"part-000000-00000-00002\.arrow is damaged .* delete it"):
        runs.synthesize(tmp_path, num_conversations=4)
    shard.unlink()
    runs.synthesize(tmp_path, num_conversations=4)
    assert shard.read_bytes() == whole
    (tmp_path / "self_study.json").write_text("{")
    with pytest.raises(ValueError, match=r"self_study\.json is damaged"):
        runs.synthesize(tmp_path, num_conversations=4)


def test_the_data_set_says_what_it_is_made_from(tmp_path: Path) -> None:
    dataset = runs.synthesize(tmp_path, num_conversations=12)
    told = read_report(dataset)
    assert {**told, "left_out": {}} == json.loads((tmp_path / "self_study.json").read_text())
    assert read_report(load_self_study(tmp_path)) == told
    assert told["base_model"] == "LlamaForCausalLM"
    assert told["corpus"]["name"] == "doc0" and told["corpus"]["characters"] == len(runs.TEXT)
    assert len(told["tokenizer_fingerprint"]) == len(told["corpus"]["sha256"]) == 64
    assert told["synthesis"]["num_conversations"] == 12 and "torch" in told["versions"]
    report = told["report"]
    assert report["kept"] == len(dataset)
    assert report["made"] == report["kept"] + sum(report["dropped"].values())
    assert report["coverage"]["doc0"]["num_chunks"] == report["chunks"] == 6
    with pytest.raises(ValueError, match="carries no description"):
        read_report(Dataset.from_dict({"text": ["x"]}))


def test_an_empty_part_is_finished_too(tmp_path: Path) -> None:
    rows = runs.synthesize(None, num_conversations=2)
    folder, part = ConversationFolder(tmp_path), Part(3, 0, 2)
    folder.write(WRITTEN, part, rows.select([]), {"made": 2})
    assert len(folder.read(WRITTEN, part)) == 0 and folder.read_part_report(WRITTEN, part) == {"made": 2}
    assert folder.parts(WRITTEN) == [part]
