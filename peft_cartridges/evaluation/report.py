"""What an evaluation found: JSON to keep, a table and a plot to look at, entries for the card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .intervals import Estimate, bootstrap, gap_share, weighted_mean
from .measurements import Items

# Metric -> (heading, how it is written, whether more is better); in the order of the tables.
ON_CONTEXT: dict[str, tuple[str, str, bool]] = {
    "gold_nll": ("gold-answer NLL", ".3f", False),
    "gap_closed": ("gap closed", ".0%", True),
    "teacher_kl": ("KL from the text in context", ".3f", False),
    "teacher_agreement": ("top-1 agreement with it", ".0%", True),
    "choice_accuracy": ("multiple choice", ".0%", True),
    "exact_match": ("exact match", ".0%", True),
    "token_f1": ("token F1", ".2f", True),
    "rouge_l": ("ROUGE-L", ".2f", True),
    "chrf": ("chrF", ".2f", True),
    "judged_right": ("judged right", ".0%", True),
    "gate_accepted": ("accepted by the gate", ".0%", True),
}
OFF_CONTEXT: dict[str, tuple[str, str, bool]] = {
    "general_kl": ("KL from the bare model", ".3f", False),
    "general_agreement": ("top-1 agreement with it", ".0%", True),
    "gate_rejected": ("rejected by the gate", ".0%", True),
    "general_nll": ("NLL on general prompts", ".3f", False),
    "general_choice_accuracy": ("general multiple choice", ".0%", True),
    "instructions_followed": ("instructions followed", ".0%", True),
    "contamination": ("contamination", ".0%", False),
    "abstained": ("abstained where it should", ".0%", True),
    "abstained_wrongly": ("where it should not", ".0%", False),
    "abstention_separation": ("tells them apart (AUC)", ".2f", True),
}
METRICS = {**ON_CONTEXT, **OFF_CONTEXT}


@dataclass
class SystemResult:
    """One system's figures.

    Args:
        name: Of the system.
        num_tokens, kv_bytes, seconds, flops, note: As in `System`.
        items: Each metric item by item; numbers only, no text.
        first_token_seconds, tokens_per_second: Measured here.
        reason: Why it could not be measured.
    """

    name: str
    num_tokens: int = 0
    kv_bytes: int = 0
    seconds: float = 0.0
    flops: float | None = None
    note: str = ""
    items: dict[str, Items] = field(default_factory=dict)
    first_token_seconds: float | None = None
    tokens_per_second: float | None = None
    reason: str | None = None


def estimate(
    result: SystemResult,
    metric: str,
    *,
    without: SystemResult | None = None,
    full: SystemResult | None = None,
    samples: int = 1000,
    seed: int = 0,
    clusters: Sequence[Any] | None = None,
) -> Estimate | None:
    """A metric of a system with its interval; `None` where it was not measured. `gap_closed` needs the two ends."""
    if metric == "gap_closed":
        ends = [end.items.get("gold_nll") if end else None for end in (without, full)]
        ours = result.items.get("gold_nll")
        if ours is None or ends[0] is None or ends[1] is None:
            return None
        statistic, n = gap_share(ends[0].values, ours.values, ends[1].values), len(ours.values)
    elif metric in result.items:
        items = result.items[metric]
        statistic, n = weighted_mean(items.values, items.weights), len(items.values)
    else:
        return None
    return bootstrap(statistic, n, samples=samples, seed=seed, clusters=clusters)


@dataclass
class EvaluationReport:
    """The figures of all systems on one text.

    Args:
        systems: In the order of the tables.
        text_tokens: Length of the text in context.
        settings: Of the evaluation.
        versions: Of libraries and model.
        command: That printed it.
    """

    systems: list[SystemResult]
    text_tokens: int
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""

    def __getitem__(self, name: str) -> SystemResult:
        """Raises:
        KeyError: there is no system of that name.
        """
        for system in self.systems:
            if system.name == name:
                return system
        raise KeyError(f"{name!r}; there are: {', '.join(system.name for system in self.systems)}")

    def get(self, system: str, metric: str) -> Estimate | None:
        """A figure with its interval, or `None` where it was not measured."""
        ends = {result.name: result for result in self.systems if result.reason is None}
        return estimate(
            self[system], metric, without=ends.get("no context"), full=ends.get("full text"),
            samples=self.settings.get("bootstrap_samples", 1000), seed=self.settings.get("seed", 0),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: `systems` with `metrics` (value, low, high, n) and their `items`."""
        systems = []
        for result in self.systems:
            found = {metric: self.get(result.name, metric) for metric in METRICS}
            metrics = {name: asdict(value) for name, value in found.items() if value is not None}
            systems.append({**_without_nan(asdict(result)), "metrics": _without_nan(metrics)})
        return {
            "version": 1, "text_tokens": self.text_tokens, "settings": self.settings, "versions": self.versions,
            "command": self.command, "systems": systems,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EvaluationReport:
        """The report that `to_dict` wrote."""
        systems = []
        for row in record["systems"]:
            items = {name: Items(**value) for name, value in row["items"].items()}
            systems.append(SystemResult(**{**{k: v for k, v in row.items() if k != "metrics"}, "items": items}))
        return cls(systems, record["text_tokens"], record["settings"], record["versions"], record["command"])

    def save(self, path: str | Path) -> None:
        """Writes the JSON, complete or not at all."""
        from ..atomic_files import write_text

        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def table(self) -> str:
        """Three Markdown tables: on the text, off it, and what it costs; reasons below."""
        parts = [
            f"### On the text ({self.text_tokens:,} tokens)\n\n{self._metrics_table(ON_CONTEXT)}",
            f"### Off the text\n\n{self._metrics_table(OFF_CONTEXT)}" if self._measured(OFF_CONTEXT) else "",
            f"### What it costs\n\n{self._cost_table()}",
            self._reasons(),
        ]
        return "\n\n".join(part for part in parts if part)

    def _reasons(self) -> str:
        """What was not measured, a line a reason."""
        names: dict[str, list[str]] = {}
        for result in self.systems:
            if result.reason is not None:
                names.setdefault(result.reason, []).append(result.name)
        return "\n".join(f"- Not measured: {', '.join(named)}: {reason}" for reason, named in names.items())

    def _measured(self, columns: Mapping[str, Any]) -> list[str]:
        present = {metric for r in self.systems for metric in r.items}
        if any(self.get(r.name, "gap_closed") for r in self.systems if r.reason is None):
            present.add("gap_closed")
        return [metric for metric in columns if metric in present]

    def _metrics_table(self, columns: Mapping[str, tuple[str, str, bool]]) -> str:
        names = self._measured(columns)
        rows = []
        for result in self.systems:
            if result.reason is not None:
                continue
            cells = [self.get(result.name, name) for name in names]
            rows.append(
                [result.name, f"{result.num_tokens:,}"]
                + [
                    "–" if c is None or math.isnan(c.value) else format(c, columns[n][1])
                    for n, c in zip(names, cells, strict=True)
                ]
            )
        arrows = [f"{columns[name][0]} {'↑' if columns[name][2] else '↓'}" for name in names]
        return markdown_table(["", "tokens", *arrows], rows)

    def _cost_table(self) -> str:
        head = ["", "KV size", "to make", "FLOPs to make", "first token", "tokens/s"]
        rows = [
            [
                r.name,
                f"{r.kv_bytes / 1e6:,.2f} MB",
                f"{r.seconds:,.1f} s",
                "–" if r.flops is None else f"{r.flops:.2e}",
                "–" if r.first_token_seconds is None else f"{r.first_token_seconds:.3f} s",
                "–" if r.tokens_per_second is None else f"{r.tokens_per_second:,.0f}",
            ]
            for r in self.systems
            if r.reason is None
        ]
        return markdown_table(head, rows)

    def card_metrics(self, dataset: str, system: str = "cartridge") -> list[Any]:
        """`Metric`s for the model card (`CardFacts.metrics`), which writes them as evaluation results.

        Args:
            dataset: What they were measured on, for people.
            system: Whose.
        """
        from ..hub.card_facts import Metric

        found = []
        for name, (heading, spec, _) in METRICS.items():
            value = self.get(system, name)
            if value is None or math.isnan(value.value):
                continue
            full = self.get("full text", name) if "full text" in [r.name for r in self.systems] else None
            note = f"95 % interval {value.low:{spec}} to {value.high:{spec}}" if not math.isnan(value.low) else ""
            if full is not None and name != "gap_closed":
                note = "; ".join(filter(None, [note, f"{full.value:{spec}} with the text in context"]))
            found.append(Metric(heading, round(value.value, 4), dataset, name, self.command or None, note or None))
        return found

    def plot(self, path: str | Path, metric: str = "gap_closed") -> None:
        """A figure of one metric against bytes of keys and values, with intervals.

        Raises:
            ImportError: matplotlib is not installed.
        """
        plt = pyplot()
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for result in self.systems:
            value = self.get(result.name, metric) if result.reason is None else None
            if value is None or math.isnan(value.value):
                continue
            size = max(result.kv_bytes, 1) / 1e6
            spread = None if math.isnan(value.low) else [[value.value - value.low], [value.high - value.value]]
            mark = axes.errorbar([size], [value.value], yerr=spread, fmt="o", capsize=3)
            axes.annotate(
                result.name, (size, value.value), textcoords="offset points", xytext=(6, 4), fontsize=8,
                color=mark[0].get_color(),
            )  # fmt: skip
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlabel("keys and values, MB")
        axes.set_ylabel(METRICS[metric][0])
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)


def pyplot() -> Any:
    """matplotlib without a display.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("A plot needs matplotlib: pip install 'peft-cartridges[eval]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """The first column to the left, and the others to the right where they are numbers."""
    lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
