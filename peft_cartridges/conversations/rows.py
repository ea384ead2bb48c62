"""The rows of a conversation set: their columns, and how they are read fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value

from .targets import TARGETS

_COLUMNS = {
    "id": Value("string"),
    "messages": List({"role": Value("string"), "content": Value("string")}),
    "input_ids": List(Value("int32")),
    "completion_mask": List(Value("int8")),
    "turns_start": Value("int32"),
    "chunk_id": Value("string"),
    "context": Value("string"),
    "seed_type": Value("string"),
    "origin": Value("string"),
}
_USEFULNESS = {"usefulness": Value("float32")}
_TARGET_COLUMNS = [name for columns in TARGETS.values() for name in columns]


def make_features(targets: str, *, usefulness: bool = False) -> Features:
    """The columns of a set with one kind of targets (a name of `TARGETS`), and `usefulness` where that is measured."""
    return Features({**_COLUMNS, **(_USEFULNESS if usefulness else {}), **TARGETS[targets]})


def rows_to_table(rows: Sequence[Mapping[str, Any]], features: Features) -> pa.Table:
    """Rows as they are kept; there may be none."""
    return pa.table({name: [row[name] for row in rows] for name in features}, schema=features.arrow_schema)


def with_fast_targets(dataset: Dataset) -> Dataset:
    """The data set, its teacher's targets as tensors (`float32`, `int64`) that are read from Arrow's buffers, and the
    other columns as they are. As Python lists, 16 rows of 96 tokens at hidden size 4,096 take more than a second."""
    columns = [name for name in _TARGET_COLUMNS if name in dataset.column_names]
    return dataset.with_format("torch", columns=columns, output_all_columns=True) if columns else dataset


def kind_of_targets(dataset: Dataset) -> str:
    """Which of `TARGETS` the data set has."""
    return next(name for name, columns in TARGETS.items() if set(columns) <= set(dataset.column_names))


def off_context_rows(dataset: Dataset) -> list[int]:
    """Which rows are general conversations, whose teacher has no text in its context: those without `context`."""
    if "context" not in dataset.column_names:
        return []
    contexts = dataset.select_columns(["context"]).with_format("arrow")[:]["context"]
    return pc.indices_nonzero(pc.equal(pc.fill_null(contexts, ""), "")).to_pylist()


def learned_tokens(row: Mapping[str, Any]) -> torch.Tensor:
    """Places of the learned tokens of a row `[learned]`, counted from its first token."""
    return torch.as_tensor(row["completion_mask"]).nonzero()[:, 0]
