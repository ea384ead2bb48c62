"""A run's finished chunks on disk: one Arrow file each, there as a whole or not at all.

output_dir/
  self_study.json           what the run is, and in the end what came of it
  shards/chunk-000012.arrow  the conversations about chunk 12
  shards/chunk-000012.json   what came of chunk 12
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features

from .chunk_study import ChunkReport

RUN_FILE = "self_study.json"
_SHARD = re.compile(r"chunk-(\d+)\.arrow$")


def rows_to_dataset(rows: list[dict[str, Any]], features: Features) -> Dataset:
    """A data set of rows; there may be none."""
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


class Shards:
    """The finished chunks of a run in a folder.

    Args:
        output_dir: The run's folder; made if it is not there.
        features: Columns of the data set.
    """

    def __init__(self, output_dir: str | Path, features: Features) -> None:
        self.folder = Path(output_dir) / "shards"
        self.features = features
        self.folder.mkdir(parents=True, exist_ok=True)

    def done(self) -> set[int]:
        """Numbers of the chunks that are finished."""
        return {int(match[1]) for name in os.listdir(self.folder) if (match := _SHARD.match(name))}

    def write(self, number: int, rows: list[dict[str, Any]], report: ChunkReport) -> None:
        """Keeps a finished chunk. It counts as finished once the Arrow file has its name, which comes last."""
        write_atomically(self._path(number, "json"), json.dumps(report.to_dict(), ensure_ascii=False).encode())
        table = rows_to_dataset(rows, self.features).data.table
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        write_atomically(self._path(number, "arrow"), sink.getvalue().to_pybytes())

    def read(self, number: int) -> tuple[Dataset, ChunkReport]:
        """A finished chunk, its data mapped from disk.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(number, "arrow")
        try:
            dataset = Dataset.from_file(str(path))
            report = json.loads(self._path(number, "json").read_text())
        except (pa.ArrowException, json.JSONDecodeError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and run the same command again.") from error
        return dataset, ChunkReport.from_dict(report)

    def remove_leftovers(self) -> None:
        """Removes what a killed process was writing."""
        for path in self.folder.glob("*.partial"):
            path.unlink(missing_ok=True)

    def _path(self, number: int, ending: str) -> Path:
        return self.folder / f"chunk-{number:06d}.{ending}"


class ShardsInMemory:
    """The finished chunks of a run that is not kept on disk."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self._chunks: dict[int, tuple[Dataset, ChunkReport]] = {}

    def done(self) -> set[int]:
        return set(self._chunks)

    def write(self, number: int, rows: list[dict[str, Any]], report: ChunkReport) -> None:
        self._chunks[number] = (rows_to_dataset(rows, self.features), report)

    def read(self, number: int) -> tuple[Dataset, ChunkReport]:
        return self._chunks[number]

    def remove_leftovers(self) -> None:
        pass


def write_atomically(path: Path, content: bytes) -> None:
    """The file is there with all of its content or not at all, also if the process is killed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    partial.replace(path)
