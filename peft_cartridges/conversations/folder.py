"""A conversation set on disk: a folder with a manifest and Arrow shards, each there as a whole or not at all.

output_dir/
  self_study.json                                       what the set is made from, and in the end what came of it
  written/part-000012-00000-00032.arrow                 conversations 0 to 31 about chunk 12, as they were written
  written/part-000012-00000-00032.json                  what came of them
  written/off-context-00000-00026.arrow, .json          general conversations, about no chunk
  hidden_states/part-000012-00000-00032.arrow, .json    the same with the teacher's targets of that kind

Any number of processes and jobs may work in one folder: a part is claimed by a lock that ends with its holder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from filelock import FileLock, Timeout

from ..atomic_files import write_bytes, write_text
from .provenance import differences

MANIFEST = "self_study.json"
WRITTEN = "written"
_PART = re.compile(r"(?:part-(\d+)|off-context)-(\d+)-(\d+)\.arrow$")
# Stands for a chunk's number in parts that are about none; they come last.
OFF_CONTEXT = sys.maxsize
# Conversations in such a part: processes share them too.
_OFF_CONTEXT_PART = 64


@dataclass(frozen=True, order=True)
class Part:
    """Conversations `first` to `end` (excluded) about a chunk, or (`OFF_CONTEXT`) about none."""

    chunk: int
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    def __str__(self) -> str:
        about = "off-context" if self.is_off_context else f"part-{self.chunk:06d}"
        return f"{about}-{self.first:05d}-{self.end:05d}"

    @property
    def is_off_context(self) -> bool:
        return self.chunk == OFF_CONTEXT

    @property
    def about(self) -> str:
        """What names its chunk in the ids of its conversations."""
        return "off" if self.is_off_context else str(self.chunk)


def cover(parts: Iterable[Part]) -> list[Part]:
    """Of parts that may overlap (a set was extended while a smaller one was made), those that have every conversation
    once, in order."""
    chosen: list[Part] = []
    for part in sorted(parts, key=lambda one: (one.chunk, one.first, -one.end)):
        end = chosen[-1].end if chosen and chosen[-1].chunk == part.chunk else 0
        if part.first == end:
            chosen.append(part)
    return chosen


def plan_parts(there: Sequence[Part], wanted: Mapping[int, int]) -> list[Part]:
    """The parts that make up a set: those that are there, and what they lack.

    Args:
        there: The finished ones.
        wanted: How many conversations there are to be about each chunk (`OFF_CONTEXT`: about none).
    """
    plan = []
    for chunk, number in wanted.items():
        end = 0
        for part in cover(part for part in there if part.chunk == chunk):
            if end < number:
                plan.append(part)
                end = part.end
        longest = _OFF_CONTEXT_PART if chunk == OFF_CONTEXT else number
        plan += [Part(chunk, first, min(first + longest, number)) for first in range(end, number, longest)]
    return plan


class ConversationFolder:
    """The folder of a set.

    Args:
        path: Made when something is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def manifest(self) -> dict[str, Any] | None:
        """What the set is; `None` if the folder holds none.

        Raises:
            ValueError: the manifest is damaged.
        """
        path = self.path / MANIFEST
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}): use another `output_dir`.") from None

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_text(self.path / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False))

    def claim(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the manifest, or checks that the one that is there is of the same set; gives the set's identity.

        A set that an engine wrote, whose weights nobody has seen, is the set of the first model that comes to score it.

        Raises:
            ValueError: the folder holds another set; the message names what differs.
        """
        found = self.manifest()
        if found is None:
            self.write_manifest(identity)
            return dict(identity)
        if found.get("format") != identity["format"]:
            raise ValueError(
                f"`output_dir` ({self.path}) holds a set of another version of peft-cartridges (format "
                f"{found.get('format')}, this one has {identity['format']}): use another `output_dir`, or carry it on "
                "with that version."
            )
        if found.get("address") == identity["address"]:
            return dict(identity)
        differing = differences(identity, found)
        seen = found.get("model_fingerprint")
        if [*differing] == ["model"] and seen in ("", identity["model_fingerprint"]):
            return {**identity, **{name: found[name] for name in ("address", "base_model", "decided_by")}}
        raise ValueError(
            f"`output_dir` ({self.path}) holds another conversation set: {'; '.join(differing.values())}. Give those "
            "settings to carry it on, or another `output_dir`."
        )

    def parts(self, stage: str) -> list[Part]:
        """The finished parts of a stage (`written`, or a kind of targets), in order."""
        names = os.listdir(self.path / stage) if (self.path / stage).is_dir() else []
        found = [match.groups(default=OFF_CONTEXT) for name in names if (match := _PART.match(name))]
        return sorted(Part(*map(int, numbers)) for numbers in found)

    def stages(self) -> list[str]:
        """Stages with finished parts."""
        folders = sorted(entry.name for entry in self.path.iterdir() if entry.is_dir()) if self.path.is_dir() else []
        return [name for name in folders if self.parts(name)]

    def write(self, stage: str, part: Part, rows: pa.Table | Dataset, report: Mapping[str, Any]) -> None:
        """Keeps a finished part. It counts as finished once the Arrow file has its name, which comes last."""
        write_text(self._file(stage, part, "json"), json.dumps(report, ensure_ascii=False))
        table = rows.data.table if isinstance(rows, Dataset) else rows
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        write_bytes(self._file(stage, part, "arrow"), memoryview(sink.getvalue()))

    def has(self, stage: str, part: Part) -> bool:
        return self._file(stage, part, "arrow").exists()

    def read(self, stage: str, part: Part) -> Dataset:
        """A finished part, mapped from disk.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._file(stage, part, "arrow")
        try:
            return Dataset.from_file(str(path))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and run the same command again.") from error

    def read_part_report(self, stage: str, part: Part) -> dict[str, Any]:
        """What came of a part.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._file(stage, part, "json")
        try:
            return json.loads(path.read_text())
        except (json.JSONDecodeError, OSError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete {path.with_suffix('.arrow')}, and run again."
            ) from None

    @contextlib.contextmanager
    def claimed(self, stage: str, part: Part) -> Iterator[bool]:
        """Whether the part is ours to make: nobody else is at it, and it is not there yet. The claim ends with the
        block, or with the process."""
        locks = self.path / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        path = locks / f"{stage}-{part}.lock"
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield not self.has(stage, part)
        finally:
            # Gone before it is released: who waits for the old file finds the part finished.
            if self.has(stage, part):
                path.unlink(missing_ok=True)
            lock.release()

    def _file(self, stage: str, part: Part, ending: str) -> Path:
        return self.path / stage / f"{part}.{ending}"
