"""The kept JSON lines, and figures over them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_cartridges.evaluation import Estimate, EvaluationReport, bootstrap
from peft_cartridges.evaluation.measurements import Items
from peft_cartridges.evaluation.report import METRICS, SystemResult, markdown_table

Record = dict[str, Any]
# (label, records, system, or one for each record)
Row = tuple[str, Sequence[Record], "str | Sequence[str]"]

# From so many documents on an interval is over documents; of fewer it is over their questions.
_ENOUGH = 6


def read_records(path: Path, settings: dict[str, Any] | None = None) -> dict[str, Record]:
    """Name -> record of the finished cells, the last of each name. Left out are a line that a kill cut short, and with
    `settings` those that were measured with others."""
    records: dict[str, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if settings is None or record.get("settings") == settings:
            records[record["name"]] = record
    return records


def result_from_dict(row: dict[str, Any]) -> SystemResult:
    """Of a line that a stopped cell has kept."""
    fields = {key: value for key, value in row.items() if key != "system"}
    items = {name: Items(**value) for name, value in row["items"].items()}
    return SystemResult(**{**fields, "name": row["system"], "items": items})


def rounded(value: Any) -> Any:
    """Five decimals are enough for a line that is kept."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return round(value, 5) if isinstance(value, float) and abs(value) < 1e6 else value


@dataclass(frozen=True)
class Side:
    """One system on one document: its items of a metric, and for `gap_closed` those of the two ends."""

    items: Items
    none: Items | None = None
    full: Items | None = None

    def value(self, chosen: np.ndarray) -> float:
        ours = np.asarray(self.items.values)[chosen].sum()
        if self.none is None or self.full is None:
            return float(ours / np.asarray(self.items.weights)[chosen].sum())
        none, full = (np.asarray(end.values)[chosen].sum() for end in (self.none, self.full))
        return float((none - ours) / (none - full)) if none > full else math.nan


class Results:
    """Records by group, with figures over documents.

    Args:
        records: The lines.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = list(records)
        self._reports = {r["name"]: EvaluationReport.from_dict(r["report"]) for r in records if "report" in r}

    def of(self, group: str, **params: Any) -> list[Record]:
        return [
            r for r in self.records if r["group"] == group and all(r["params"].get(k) == v for k, v in params.items())
        ]

    def systems(self, records: Sequence[Record]) -> list[str]:
        """Names of all systems that were measured, in the order of the reports."""
        names = (s.name for r in records for s in self._reports[r["name"]].systems if s.reason is None)
        return list(dict.fromkeys(names))

    def reasons(self, records: Sequence[Record]) -> dict[str, list[str]]:
        """Reason -> what was not measured for it."""
        found: dict[str, dict[str, None]] = {}
        for record in records:
            for system in self._reports[record["name"]].systems:
                if system.reason is not None:
                    found.setdefault(system.reason, {})[system.name] = None
        return {reason: list(names) for reason, names in found.items()}

    def _side(self, record: Record, system: str, metric: str) -> Side | None:
        results = {s.name: s for s in self._reports[record["name"]].systems if s.reason is None}
        if system not in results:
            return None
        if metric != "gap_closed":
            items = results[system].items.get(metric)
            return Side(items) if items else None
        ends = [results[end].items["gold_nll"] if end in results else None for end in ("no context", "full text")]
        if ends[0] is None or ends[1] is None:
            return None
        return Side(results[system].items["gold_nll"], *ends)

    def figure(self, records: Sequence[Record], system: str, metric: str) -> Estimate | None:
        """The mean over documents, with a 95 % interval."""
        sides = [side for record in records if (side := self._side(record, system, metric)) is not None]
        return _over_documents([[side] for side in sides], lambda values: values[0])

    def difference(
        self, one: Sequence[Record], other: Sequence[Record], systems: tuple[str, str], metric: str
    ) -> Estimate | None:
        """How much `one` is above `other` on the documents that both have, pair by pair on the same items."""
        others = {record["document"]: record for record in other}
        pairs = []
        for record in one:
            if record["document"] in others:
                sides = [
                    self._side(r, s, metric) for r, s in zip((record, others[record["document"]]), systems, strict=True)
                ]
                if sides[0] and sides[1] and len(sides[0].items.values) == len(sides[1].items.values):
                    pairs.append([sides[0], sides[1]])
        return _over_documents(pairs, lambda values: values[0] - values[1])

    def facts(self, records: Sequence[Record], system: str, name: str) -> float:
        """The mean of a field of `SystemResult`."""
        found = [
            float(getattr(s, name)) for r in records for s in self._reports[r["name"]].systems
            if s.name == system and s.reason is None and getattr(s, name) is not None
        ]  # fmt: skip
        return sum(found) / len(found) if found else math.nan

    def count(self, records: Sequence[Record], system: str) -> int:
        """How many documents the system was measured on."""
        return len({r["document"] for r in records if self._side(r, system, "gold_nll") is not None})

    def text_tokens(self, record: Record) -> int:
        return self._reports[record["name"]].text_tokens

    def table(self, rows: Sequence[Row], metrics: Sequence[str]) -> str:
        """Rows of (label, records, system); columns are the metrics that any row has. n is documents, and items of the
        first metric."""
        cells = {(label, m): self.figure(records, str(system), m) for label, records, system in rows for m in metrics}
        shown = [m for m in metrics if any(cells[label, m] is not None for label, _, _ in rows)]
        head = ["", "tokens", "n", *(f"{METRICS[m][0]} {'↑' if METRICS[m][2] else '↓'}" for m in shown)]
        body = []
        for label, records, system in rows:
            held = [r for r in records if any(self._side(r, str(system), m) is not None for m in shown)]
            tokens = self.facts(records, str(system), "num_tokens")
            first = next((cells[label, m] for m in shown if cells[label, m] is not None), None)
            count = f"{len(held)} / {first.n}" if first else "not run"
            figures = [written(cells[label, m], METRICS[m][1]) for m in shown]
            body.append([label, "–" if math.isnan(tokens) else f"{tokens:,.0f}", count, *figures])
        return markdown_table(head, body)


def written(found: Estimate | None, spec: str) -> str:
    """An estimate for people."""
    return "–" if found is None or math.isnan(found.value) else format(found, spec)


def _over_documents(documents: Sequence[Sequence[Side]], combine: Any) -> Estimate | None:
    """The mean over documents of what `combine` makes of the values of each one's sides, resampled together."""
    if not documents:
        return None
    lengths = [len(sides[0].items.values) for sides in documents]
    labels = np.repeat(np.arange(len(documents)), lengths)
    starts = np.cumsum([0, *lengths])

    def statistic(chosen: np.ndarray) -> float:
        found = []
        for number, sides in enumerate(documents):
            own = chosen[labels[chosen] == number] - starts[number]
            if len(own):
                # A document that was drawn twice counts twice.
                times = len(own) / lengths[number]
                found.append((combine([side.value(own) for side in sides]), times))
        values, times = (np.array(column) for column in zip(*found, strict=True))
        return float((values * times).sum() / times.sum())

    grouped = {"clusters": labels.tolist()} if len(documents) >= _ENOUGH else {"strata": labels.tolist()}
    return bootstrap(statistic, len(labels), samples=500, **grouped)
