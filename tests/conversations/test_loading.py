"""Sets are loaded, merged, filtered and kept with their origin, and however many rows they have, memory stays flat."""

from __future__ import annotations

import json
import shutil
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset

from peft_cartridges import load_self_study
from peft_cartridges.conversations import (
    ConversationFolder,
    Part,
    make_features,
    merge_self_study,
    read_provenance,
    read_report,
    save_self_study,
    with_fast_targets,
)
from peft_cartridges.conversations.folder import WRITTEN
from tests.self_study import runs
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set")
    runs.synthesize(path, num_conversations=8)
    return path


def _other(**options: Any) -> Dataset:
    args = runs.settings(num_conversations=4, **options)
    return runs.SelfStudySynthesizer(tiny_model(seed=1), tiny_tokenizer(), args).synthesize(runs.TEXT)


def test_a_folder_is_loaded_as_it_was_made(folder: Path) -> None:
    made = runs.synthesize(folder, num_conversations=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load_self_study(folder)
    assert loaded.to_dict() == made.to_dict() and read_report(loaded) == read_report(made)
    (origin,) = set(loaded["origin"])
    assert json.loads(origin)["model_fingerprint"] == read_report(loaded)["model_fingerprint"]


def test_targets_are_tensors_that_are_read_without_python_lists(folder: Path) -> None:
    loaded = with_fast_targets(load_self_study(folder))
    row = loaded[1]
    assert isinstance(row["teacher_hidden_states"], torch.Tensor) and isinstance(row["input_ids"], list)
    plain = loaded.with_format(None)[1]["teacher_hidden_states"]
    assert row["teacher_hidden_states"].tolist() == plain
    rows = loaded.__getitems__([2, 5])
    assert [len(one["teacher_hidden_states"]) for one in rows] == [32 * sum(one["completion_mask"]) for one in rows]
    assert with_fast_targets(loaded.with_format(None)).format == loaded.format
    live = load_self_study(folder, targets="live")
    assert "teacher_hidden_states" not in live.column_names and live["id"][:] == loaded["id"][:]


def test_the_origin_survives_parquet_filters_and_merges(folder: Path, tmp_path: Path) -> None:
    loaded = load_self_study(folder)
    told = {key: value for key, value in read_provenance(loaded).items() if key in json.loads(loaded[0]["origin"])}
    loaded.to_parquet(tmp_path / "set.parquet")
    for back in (
        load_dataset("parquet", data_files=str(tmp_path / "set.parquet"), split="train"),
        load_self_study(tmp_path / "set.parquet"),
        loaded.filter(lambda row: row["seed_type"] != "question"),
        concatenate_datasets([loaded, loaded]),
    ):
        assert {key: value for key, value in read_provenance(back).items() if key in told} == told
    loaded.save_to_disk(tmp_path / "saved")
    assert read_report(load_self_study(tmp_path / "saved")) == read_report(loaded)
    assert read_provenance(Dataset.from_dict({"text": ["x"]})) == {}
    mixed = concatenate_datasets([loaded, _other()]).with_format(None)
    mixed.info.description = ""
    with pytest.raises(ValueError, match="rows come from different models"):
        read_provenance(mixed)


def test_a_stream_says_where_it_is_from(folder: Path) -> None:
    stream = load_self_study(folder).to_iterable_dataset()
    assert read_provenance(stream)["base_model"] == "LlamaForCausalLM"


def test_a_stream_that_names_no_columns_says_it_too(folder: Path) -> None:
    rows = load_self_study(folder).with_format(None).to_list()
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert stream.column_names is None and read_provenance(stream)["base_model"] == "LlamaForCausalLM"
    assert read_provenance(IterableDataset.from_generator(lambda: iter([{"text": "x"}]))) == {}


def test_a_save_that_was_stopped_leaves_nothing_to_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_self_study(folder)
    monkeypatch.setattr("peft_cartridges.conversations.loading._ROWS_PER_PART", 2)
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        write = ConversationFolder.write

        def stop(self: ConversationFolder, stage: str, part: Part, *args: Any) -> None:
            if part.chunk == 2:
                raise KeyboardInterrupt
            write(self, stage, part, *args)

        stopped.setattr(ConversationFolder, "write", stop)
        save_self_study(loaded, tmp_path / "some")
    save_self_study(loaded.select([4, 5]), tmp_path / "some")
    assert load_self_study(tmp_path / "some")["id"][:] == loaded["id"][4:6]
    with pytest.raises(ValueError, match="`dataset` has no rows"):
        save_self_study(loaded.select([]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_was_filtered_is_kept_and_loaded(folder: Path, tmp_path: Path) -> None:
    loaded = load_self_study(folder)
    some = loaded.filter(lambda row: row["chunk_id"] == loaded[0]["chunk_id"])
    assert 0 < len(some) < len(loaded)
    back = load_self_study(save_self_study(some, tmp_path / "some"))
    assert back.to_dict() == some.to_dict()
    told, there = read_provenance(back), read_provenance(loaded)
    assert told["address"] != there["address"] and told["model_fingerprint"] == there["model_fingerprint"]
    with pytest.raises(ValueError, match="holds a conversation set already"):
        save_self_study(some, tmp_path / "some")
    with pytest.raises(ValueError, match=r"holds another conversation set: .*rows"):
        runs.synthesize(tmp_path / "some", num_conversations=8)
    with pytest.raises(ValueError, match="is no conversation set: it lacks the columns id"):
        save_self_study(Dataset.from_dict({"input_ids": [[1]]}), tmp_path / "none")


def test_sets_of_one_model_are_merged_each_conversation_once(folder: Path) -> None:
    loaded, more = load_self_study(folder), runs.synthesize(None, num_conversations=6, synthesis_seed=7)
    merged = merge_self_study([loaded, more, loaded.select([0])])
    assert merged["id"][:] == loaded["id"][:] + more["id"][:]
    told = read_report(merged)
    assert told["report"]["kept"] == len(merged) and told["corpus"]["name"] == "doc0"
    assert [one["address"] for one in told["merged_from"]][:2] == [
        read_report(one)["address"] for one in (loaded, more)
    ]
    with pytest.raises(ValueError, match="different base models"):
        merge_self_study([loaded, _other()])
    with pytest.raises(ValueError, match=r"different targets \(hidden_states, live\)"):
        merge_self_study([loaded, runs.synthesize(None, num_conversations=2, teacher_targets="live")])


def test_what_is_no_set_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder \./nowhere, and it is no name on the Hub"):
        load_self_study("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither shards nor Parquet files"):
        load_self_study(tmp_path / "empty")
    with pytest.raises(ValueError, match="`targets` is 'logits'; there are: hidden_states, top_k, live"):
        load_self_study(folder, targets="logits")
    with pytest.raises(ValueError, match="has no 'top_k' targets but hidden_states, written: score it anew"):
        load_self_study(folder, targets="top_k")
    shutil.copytree(folder, tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "self_study.json").read_text())
    (tmp_path / "old" / "self_study.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ValueError, match=r"written by another version of peft-cartridges \(format 2, this one has 3\)"):
        load_self_study(tmp_path / "old")


# -- many rows ---------------------------------------------------------------------------------------------------------


def _made_up(number: int, hidden_size: int = 64, learned: int = 8) -> Dataset:
    """Rows in Arrow's own way, so that a test can have many."""
    columns: dict[str, Any] = {
        "id": pa.array([f"a-0-{row}" for row in range(number)]),
        "messages": pa.array([[{"role": "user", "content": "?"}]] * number),
        "input_ids": pa.FixedSizeListArray.from_arrays(np.arange(number * 16, dtype=np.int32) % 99, 16),
        "completion_mask": pa.FixedSizeListArray.from_arrays(np.tile(np.int8([0] * 8 + [1] * 8), number), 16),
        "turns_start": pa.array([0] * number),
        "teacher_hidden_states": pa.FixedSizeListArray.from_arrays(
            np.zeros(number * learned * hidden_size, dtype=np.float16), learned * hidden_size
        ),
    }
    texts = {name: pa.array(["x"] * number) for name in ("chunk_id", "context", "seed_type", "origin")}
    features = make_features("hidden_states")
    table = pa.table({name: {**columns, **texts}[name] for name in features}).cast(features.arrow_schema)
    return Dataset(table)


def _peak_of_reading(path: Path, number: int) -> tuple[int, int]:
    """Bytes that Python and Arrow took at most while all rows were read, 16 at a time, from a set on disk."""
    folder, each = ConversationFolder(path), 2_000
    rows = _made_up(each)
    for chunk in range(number // each):
        folder.write("hidden_states", Part(chunk, 0, each), rows, {})
    folder.write_manifest({"format": 3, "report": {}, "left_out": {"a-0-7": "duplicate"}})
    del rows
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    dataset, arrow = with_fast_targets(load_self_study(path)), 0
    assert len(dataset) == number - number // each
    for start in range(0, len(dataset), max(16, len(dataset) // 200)):
        batch = dataset.__getitems__(list(range(start, min(start + 16, len(dataset)))))
        assert len(batch[0]["teacher_hidden_states"]) == 8 * 64
        arrow = max(arrow, pa.total_allocated_bytes() - before)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return python, arrow


def test_memory_stays_flat_over_100_000_conversations(tmp_path: Path) -> None:
    few = _peak_of_reading(tmp_path / "few", 4_000)
    many = _peak_of_reading(tmp_path / "many", 100_000)
    bytes_of_targets = 100_000 * 8 * 64 * 2
    # What grows are a row's number, name and place: far below a hundredth of what is read.
    assert sum(many) - sum(few) < 0.3 * bytes_of_targets, (few, many)


def test_an_unfinished_stage_is_told_about(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "half")
    half = ConversationFolder(tmp_path / "half")
    last = half.parts("hidden_states")[-1]
    (half.path / "hidden_states" / f"{last}.arrow").unlink()
    with pytest.warns(UserWarning, match="3 parts are finished, 1 more are written and not scored"):
        assert len(load_self_study(half.path)) == 6
    assert half.parts(WRITTEN)[-1] == last
