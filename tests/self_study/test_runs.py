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

from peft_cartridges.self_study import read_report
from peft_cartridges.self_study.chunking import Document
from peft_cartridges.self_study.shards import Shards
from tests.self_study import runs


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
    return {path.name: path.read_bytes() for path in (folder / "shards").glob("*.arrow")}


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
            if (tmp_path / "shards").is_dir() and len(os.listdir(tmp_path / "shards")) >= 2 * wanted:
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
    assert 10 <= len(finished) < 45
    resumed = runs.synthesize(tmp_path)
    assert finished.items() <= _shards(tmp_path).items()
    assert_same(resumed, unbroken)
    assert not list((tmp_path / "shards").glob("*.partial"))


def test_a_finished_run_is_read_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.synthesize(tmp_path, num_conversations=6)
    monkeypatch.setattr("peft_cartridges.self_study.chunk_study.ChunkStudy.study", None)
    assert_same(runs.synthesize(tmp_path, num_conversations=6), first)


def test_the_same_seed_gives_the_same_data_set_and_another_seed_another(unbroken: Dataset) -> None:
    assert_same(runs.synthesize(None), unbroken)
    other = runs.synthesize(None, num_conversations=20, seed=1)
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
    assert len(first["studied"]) == 4 and len(second["studied"]) == 3, "not shared, or studied by both"
    assert first["input_ids"] == second["input_ids"] == alone["input_ids"]
    assert_same(runs.synthesize(tmp_path, num_conversations=14), alone)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 7}, "seed"),
        ({"num_conversations": 8}, "num_conversations"),
        ({"max_similarity": 0.5}, "max_similarity"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    runs.synthesize(tmp_path, num_conversations=4)
    with pytest.raises(ValueError, match=rf"`output_dir` .* holds a run with other settings: {named} \("):
        runs.synthesize(tmp_path, **{"num_conversations": 4, **change})
    runs.synthesize(tmp_path, num_conversations=4, generation_batch_size=1)  # how it is run may change


def test_a_folder_of_another_corpus_or_model_is_refused(tmp_path: Path) -> None:
    args = runs.settings(num_conversations=4)
    runs.synthesize(tmp_path, num_conversations=4)

    def again(model: Any, corpus: Any) -> None:
        runs.SelfStudySynthesizer(model, runs.tiny_tokenizer(), args).synthesize(corpus, tmp_path)

    with pytest.raises(ValueError, match="corpus sha256"):
        again(runs.tiny_model(), [Document("doc0", f"{runs.TEXT} the end .")])
    with pytest.raises(ValueError, match="model_fingerprint"):
        again(runs.tiny_model(seed=1), runs.TEXT)


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    runs.synthesize(tmp_path, num_conversations=4)
    path = tmp_path / "self_study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    with pytest.raises(
        ValueError, match=r"`output_dir` .* another version .* \(format 1, this one has 2\): use another"
    ):
        runs.synthesize(tmp_path, num_conversations=4)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    runs.synthesize(tmp_path, num_conversations=4)
    shard = tmp_path / "shards" / "chunk-000000.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"chunk-000000\.arrow is damaged .* delete it"):
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
    assert told == json.loads((tmp_path / "self_study.json").read_text())
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


def test_an_empty_chunk_is_finished_too(tmp_path: Path) -> None:
    shards = Shards(tmp_path, runs.synthesize(None, num_conversations=2).features)
    from peft_cartridges.self_study.chunk_study import ChunkReport

    shards.write(3, [], ChunkReport({"id": "d:0-1", "document": "d", "start": 0, "end": 1}, made=2))
    dataset, report = shards.read(3)
    assert len(dataset) == 0 and report.made == 2 and shards.done() == {3}
