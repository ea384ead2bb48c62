"""docs/results.md from the JSON lines of `benchmarks.results`: tables, plots, and a row for each claim of the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_cartridges.evaluation import Estimate, EvaluationReport, bootstrap
from peft_cartridges.evaluation.cost import Cost, questions_until_cheaper
from peft_cartridges.evaluation.intervals import weighted_mean
from peft_cartridges.evaluation.report import METRICS, markdown_table, pyplot

Record = dict[str, Any]

# What is not run, why, and what its authors report: never beside our figures as if it were one of them.
PUBLISHED = (
    ("MiniCache", "not in kvpress 0.5.5", "5.02× smaller, 4-bit, LLaMA-2-7B on ShareGPT", "2405.14366"),
    (
        "Doc-to-LoRA", "its hypernetwork is trained for other base models",
        "near-perfect needles beyond 4× the window", "2602.15902",
    ),
    ("PALU", "decomposes the base model's own weights, model by model", "91 % smaller", "2407.21118"),
    ("Lexico", "wants dictionaries trained for each base model", "–", "2412.08890"),
    ("RestoreKV", "its adapters exist for Llama-3.1-8B and Qwen3-8B only; kvpress loads them there", "–", "2608.01247"),
    ("FINCH", "compresses for a known question; a cartridge answers unknown ones", "–", "2408.00167"),
    ("Mamba, RWKV, xLSTM, Hyena", "other models, not other ways to keep a text for this one", "–", "–"),
    ("Cartridges (the paper)", "its models want GPUs", "38.6× less memory, 26.4× throughput at the quality of ICL", "2506.06266"),
)  # fmt: skip

_ON = ("gap_closed", "gold_nll", "teacher_kl", "teacher_agreement", "choice_accuracy", "token_f1", "rouge_l", "chrf")
_OFF = (
    "general_kl", "general_agreement", "general_nll", "instructions_followed", "contamination", "abstention_separation",
)  # fmt: skip


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
        """Names of all systems, in the order of the reports."""
        names = (s.name for r in records for s in self._reports[r["name"]].systems if s.reason is None)
        return list(dict.fromkeys(names))

    def reasons(self, records: Sequence[Record]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for record in records:
            for system in self._reports[record["name"]].systems:
                if system.reason is not None:
                    found.setdefault(system.reason, [])
                    if system.name not in found[system.reason]:
                        found[system.reason].append(system.name)
        return found

    def figure(self, records: Sequence[Record], system: str, metric: str) -> Estimate | None:
        """The mean over documents with an interval over documents; of a single document its own, over questions."""
        values = []
        for record in records:
            report = self._reports[record["name"]]
            if system in [s.name for s in report.systems]:
                value = report.get(system, metric)
                if value is not None and not math.isnan(value.value):
                    values.append(value)
        if not values:
            return None
        if len(values) == 1:
            return values[0]
        return bootstrap(weighted_mean([value.value for value in values]), len(values))

    def facts(self, records: Sequence[Record], system: str, name: str) -> float:
        """The mean of a field of `SystemResult`."""
        found = [
            float(getattr(s, name)) for r in records for s in self._reports[r["name"]].systems
            if s.name == system and getattr(s, name) is not None
        ]  # fmt: skip
        return sum(found) / len(found) if found else math.nan

    def text_tokens(self, record: Record) -> int:
        return self._reports[record["name"]].text_tokens

    def table(self, rows: Sequence[tuple[str, Sequence[Record], str]], metrics: Sequence[str]) -> str:
        """Rows of (label, records, system); columns are the metrics that any row has, with how many documents."""
        cells = {(label, m): self.figure(records, system, m) for label, records, system in rows for m in metrics}
        shown = [m for m in metrics if any(cells[label, m] is not None for label, _, _ in rows)]
        head = ["", "tokens", "documents", *(f"{METRICS[m][0]} {'↑' if METRICS[m][2] else '↓'}" for m in shown)]
        body = []
        for label, records, system in rows:
            tokens = self.facts(records, system, "num_tokens")
            held = sum(
                system in [s.name for s in self._reports[r["name"]].systems if s.reason is None] for r in records
            )
            figures = [_written(cells[label, m], METRICS[m][1]) for m in shown]
            body.append([label, f"{tokens:,.0f}", str(held), *figures])
        return markdown_table(head, body)


def write_page(records: Sequence[Record], path: Path, *, cells: Sequence[str] = ()) -> Path:
    """Writes the page and its plots.

    Args:
        records: Of the cells that were run.
        path: Of the page; its plots go into the folder of its name beside it.
        cells: Names of all cells, so that the page says which were not run.
    """
    results = Results(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    plots = path.parent / path.stem
    parts = [_head(records, cells), _claims(results), _baselines(results, plots), _trained(results, plots)]
    parts += [_off_context(results), _variants(results), _cost(results, plots), _published(), _recipe()]
    parts.append(_missing(records, cells))
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _head(records: Sequence[Record], cells: Sequence[str]) -> str:
    commands = list(dict.fromkeys(r["command"] for r in records if "command" in r))
    machines = list(dict.fromkeys(f"{Path(r['model']).name}, {r['dtype']}, {r['machine']}" for r in records))
    minutes = sum(r["seconds"] for r in records) / 60
    about = f" ({'; '.join(machines)})" if machines else ""
    return (
        "# Results\n\nWritten by `python -m benchmarks.results` from its kept lines; every figure is of a run on this code. "
        f"{len(records)} cells{f' of {len(cells)}' if cells else ''}, {minutes:.0f} minutes{about}.\n\n"
        + "".join(f"    {command}\n" for command in commands)
        + "\nA cell says mean [95 % interval]: over documents, and where there is one document only, over its questions. "
        "*Gap closed* is the share of the way from no context to the whole text in context, in the gold answers' negative "
        "log-likelihood. SmolLM2-135M answers few questions right even with the text in front of it, so likelihoods and "
        "divergences say more here than answers do."
    )


def _baselines(results: Results, plots: Path) -> str:
    records = results.of("baselines")
    if not records:
        return ""
    trained = results.of("quality")
    lora = results.of("lora")
    names = results.systems(records)
    presses = results.of("presses")
    rows = [(name, records, name) for name in names]
    rows += [(name, presses, name) for name in results.systems(presses) if name not in ("no context", "full text")]
    if trained:
        rows.insert(2, ("**cartridge, trained**", trained, "cartridge"))
    if lora:
        rows.append(("LoRA of equal bytes", lora, "LoRA"))
    table = results.table(rows, ("gap_closed", "gold_nll", "teacher_kl", "teacher_agreement", "choice_accuracy"))
    off = results.table(rows, ("general_kl", "general_agreement", "general_nll"))
    sizes = markdown_table(
        ["", "keys and values", "to make"],
        [
            [
                label,
                f"{results.facts(of, name, 'kv_bytes') / 1e6:,.1f} MB",
                f"{results.facts(of, name, 'seconds'):,.1f} s",
            ]
            for label, of, name in rows
        ],
    )
    reasons = "\n".join(
        f"- {', '.join(names)}: {reason}" for reason, names in results.reasons([*records, *presses, *lora]).items()
    )
    _plot_baselines(results, rows, plots / "baselines.png")
    text = ", ".join(f"{r['document']} ({results.text_tokens(r):,} tokens)" for r in records)
    return (
        f"## Against what one would do instead\n\nAt a tenth of the text, on {text}. Of the trained cartridge and LoRA on the "
        f"documents that their rows count.\n\n![gap closed against drift]({plots.name}/baselines.png)\n\n{table}\n\n"
        f"Off the text, on prompts that have nothing to do with it:\n\n{off}\n\n{sizes}\n\n"
        + (f"Not measured:\n\n{reasons}" if reasons else "")
    )


def _trained(results: Results, plots: Path) -> str:
    quality, sizes, seconds = results.of("quality"), results.of("sizes"), results.of("seconds")
    if not quality:
        return ""
    parts = ["## Quality against size and training time"]
    rows: list[tuple[str, Sequence[Record], str]] = [("full text", quality, "full text")]
    by_size = sorted({r["params"]["shrink"] for r in sizes} | {10})
    rows += [(f"1/{s}", quality if s == 10 else results.of("sizes", shrink=s), "cartridge") for s in by_size]
    parts.append(results.table(rows, _ON))
    parts.append(
        markdown_table(
            ["", "document", "steps", "synthesis", "training", "gap closed"],
            [
                [
                    f"1/{r['params'].get('shrink', 10)}", r["document"], str(r["steps"]), f"{r['synthesis_seconds']:,.0f} s",
                    f"{r['train_seconds']:,.0f} s", _written(results.figure([r], "cartridge", "gap_closed"), ".0%"),
                ]
                for r in [*quality, *sizes, *sorted(seconds, key=lambda r: r["params"]["share"])]
            ],
        )
    )  # fmt: skip
    if len(by_size) > 1:
        _plot_sizes(results, quality, sizes, plots / "sizes.png")
        parts.append(f"![quality against size]({plots.name}/sizes.png)")
    return "\n\n".join(parts)


def _off_context(results: Results) -> str:
    records = results.of("quality")
    if not records:
        return ""
    rows: list[tuple[str, Sequence[Record], str]] = [(n, records, n) for n in ("no context", "full text", "cartridge")]
    if lora := results.of("lora"):
        rows.append(("LoRA of equal bytes", lora, "LoRA"))
    return (
        "## Off the text\n\nOn general prompts: how far the model moves from itself, whether it still follows instructions, "
        "whether words that only the text has come up (*contamination*), and whether it tells questions that the text does "
        f"not answer from those that it does.\n\n{results.table(rows, _OFF)}"
    )


_VARIANTS = {
    "initializations": ("Initializations", "start", "cartridge", "auto (most attended)"),
    "objective": ("KL against cross-entropy", "loss_type", "cartridge", "forward_kl"),
    "seeds": ("Kinds of seed prompts", "seeds", "cartridge", None),
    "sink": ("Frozen first tokens", "frozen", "cartridge", "1"),
}


def _variants(results: Results) -> str:
    parts = []
    for group, (title, param, system, base) in _VARIANTS.items():
        records = results.of(group)
        if not records:
            continue
        documents = {r["document"] for r in records}
        rows: list[tuple[str, Sequence[Record], str]] = []
        if base is not None:
            rows.append((base, [r for r in results.of("quality") if r["document"] in documents], system))
        for value in dict.fromkeys(r["params"][param] for r in records):
            rows.append((str(value), results.of(group, **{param: value}), system))
        parts.append(f"## {title}\n\n{results.table(rows, ('gap_closed', 'teacher_kl', 'general_kl'))}")
    for group, title in (
        ("composition", "Composition"), ("parts", "One text in parts"), ("long", "Texts beyond the window"),
    ):  # fmt: skip
        if records := results.of(group):
            rows = [(name, records, name) for name in results.systems(records)]
            parts.append(f"## {title}\n\n{results.table(rows, ('gap_closed', 'gold_nll', 'teacher_kl', 'general_kl'))}")
    return "\n\n".join(parts)


def _cost(results: Results, plots: Path) -> str:
    records = results.of("cost")
    if not records:
        return ""
    record = records[0]
    costs = {size: [Cost(**cost) for cost in rows] for size, rows in record["costs"].items()}
    rows = []
    for size, found in costs.items():
        for cost in found[1:]:
            count = questions_until_cheaper(found[0], cost)
            shown = "never" if math.isinf(count) else f"{count:,.0f}"
            saved = f"{found[0].making_seconds / 60:.1f} min", f"{found[0].seconds:.2f} s", f"{cost.seconds:.2f} s"
            rows.append([f"1/{size} against {cost.name}", *saved, shown])
    measured = [r for r in results.of("quality") if r["document"] == record["document"]]
    check = ""
    if measured:
        spent = measured[0]["synthesis_seconds"] + measured[0]["train_seconds"]
        told = costs["10"][0].making_seconds
        check = (
            f" The model says {told / 60:.1f} minutes for making the cartridge of 1/10; the run took {spent / 60:.1f} "
            f"({measured[0]['synthesis_seconds']:.0f} s synthesis, {measured[0]['train_seconds']:.0f} s training)."
        )
    _plot_cost(costs["10"], plots / "break_even.png")
    machine = record["machine_measured"]
    return (
        f"## When it pays\n\nBy the cost model (`cartridges cost`) with this machine's measured speed "
        f"({machine['flops'] / 1e9:,.0f} GFLOP/s in a prefill, {machine['bandwidth'] / 1e9:,.1f} GB/s of weights in "
        f"decoding), {record['document']}, {record['text_tokens']:,} tokens.{check}\n\n"
        + markdown_table(["", "making", "a question", "a question, the other way", "questions until cheaper"], rows)
        + f"\n\n![break-even]({plots.name}/break_even.png)"
    )


def _claims(results: Results) -> str:
    """Each claim of the paper with ours beside it; the verdict follows from the figures by the rule that its row says."""
    base, lora = results.of("quality"), results.of("lora")

    def gap(records: Sequence[Record], system: str = "cartridge") -> Estimate | None:
        return results.figure(records, system, "gap_closed")

    def at_least(found: Estimate | None, bar: float) -> str:
        if found is None:
            return "not run"
        low = found.value if math.isnan(found.low) else found.low
        high = found.value if math.isnan(found.high) else found.high
        return "confirmed" if low >= bar else "not confirmed" if high < bar else "not decidable: the interval spans it"

    def better(ours: Estimate | None, theirs: Estimate | None, *, more: bool = True) -> str:
        if ours is None or theirs is None:
            return "not run"
        if not more:
            ours, theirs = theirs, ours
        edges = [ours.low, ours.high, theirs.low, theirs.high]
        if any(map(math.isnan, edges)) or not (ours.low > theirs.high or ours.high < theirs.low):
            return "not decidable: the intervals overlap"
        return "confirmed" if ours.value > theirs.value else "not confirmed"

    def beside(a: Estimate | None, b: Estimate | None, spec: str = ".0%") -> str:
        return "–" if a is None or b is None else f"{_written(a, spec)} against {_written(b, spec)}"

    def same_documents(records: Sequence[Record]) -> list[Record]:
        return [r for r in base if r["document"] in {other["document"] for other in records}]

    def variant(claim: str, paper: str, group: str, **params: Any) -> list[str]:
        records = results.of(group, **params)
        mine, other = gap(same_documents(records)), gap(records)
        return [claim, paper, beside(mine, other), better(mine, other)]

    small = results.of("sizes", shrink=38)
    long = results.of("long")
    one, five = gap(results.of("seeds", seeds=1)), gap(results.of("seeds", seeds=5))
    drift = [results.figure(base, "cartridge", "general_kl"), results.figure(lora, "LoRA", "general_kl")]
    joined, alone = gap(results.of("composition"), "first of two"), gap(results.of("composition"), "the other alone")
    rows = [
        ["as good as the text in context at 38.6 times less memory", "38.6×", _written(gap(small), ".0%"), at_least(gap(small), 0.95)],
        ["(the same at a tenth)", "–", _written(gap(base), ".0%"), at_least(gap(base), 0.95)],
        variant("first tokens are a better start than random vectors", "yes", "initializations", start="random_vectors"),
        variant("a text's own tokens are a better start than another's", "yes", "initializations", start="unrelated_text"),
        variant("KL is better than cross-entropy on the conversations", "yes", "objective", loss_type="cross_entropy"),
        ["five kinds of seed prompts are better than one", "yes", beside(five, one), better(five, one)],
        variant("a frozen first token helps", "yes", "sink", frozen=0),
        ["a cartridge drifts less off the text than a LoRA of its size", "yes", beside(*drift, ".3f"), better(*drift, more=False)],
        ["two cartridges trained apart work together", "yes", beside(joined, alone), better(joined, alone)],
        [
            "a text beyond the window is learned", "484k tokens with a window of 128k",
            beside(results.figure(long, "cartridge", "gold_nll"), results.figure(long, "what fits", "gold_nll"), ".2f"),
            better(
                results.figure(long, "cartridge", "gold_nll"), results.figure(long, "what fits", "gold_nll"), more=False
            ),
        ],
    ]  # fmt: skip
    return (
        "## The paper's claims\n\nThe paper's figures are of Llama-3.2-3B and 3.1-8B on LongHealth, MTOB and QASPER "
        "([arXiv 2506.06266](https://arxiv.org/abs/2506.06266)). Ours decide a claim only where the 95 % interval does: at "
        "least 95 % of the gap for the first, intervals that do not overlap for a comparison. In rows of starts, what the "
        "claim is held against is our own default start, the most attended tokens.\n\n"
        + markdown_table(["claim", "paper", "ours: gap closed, or as said", "verdict"], rows, numbers=False)
    )


def _published() -> str:
    rows = [[name, reason, figure, source] for name, reason, figure, source in PUBLISHED]
    return "## Not run, as published\n\n" + markdown_table(
        ["", "why not here", "its authors report", "arXiv"], rows, numbers=False
    )


def _recipe() -> str:
    """The docstring of the command has the commands; here they stand as what is still to be run."""
    command = (
        "python -m benchmarks.results --budget full --device cuda --tasks longhealth quality --data DATA --documents 6 "
        "--conversations 4096 --steps 400"
    )
    models = (("Qwen/Qwen3-4B", 40960, "qwen3-4b"), ("meta-llama/Llama-3.1-8B-Instruct", 131072, "llama-3.1-8b"))
    lines = [
        f"    {command} \\\n        --model {model} --window {window} --output outputs/{name}.jsonl --page outputs/{name}.md"
        for model, window, name in models
    ]
    return (
        "## On a GPU (not run yet)\n\nLongHealth (`DATA/longhealth.json`, its `benchmark_v5.json`) and QuALITY, with models "
        "that answer:\n\n" + "\n".join(lines)
    )


def _missing(records: Sequence[Record], cells: Sequence[str]) -> str:
    done = {r["name"] for r in records}
    groups: dict[str, list[int]] = {}
    for name in cells:
        counts = groups.setdefault(name.split("/")[0], [0, 0])
        counts[0] += name in done
        counts[1] += 1
    missing = [f"- {group}: {done} of {planned} cells" for group, (done, planned) in groups.items() if done < planned]
    if not missing:
        return ""
    return "## Not run yet\n\n`make results` with a larger budget carries on from the kept lines.\n\n" + "\n".join(
        missing
    )


def _written(found: Estimate | None, spec: str) -> str:
    return "–" if found is None or math.isnan(found.value) else format(found, spec)


def _figure(path: Path) -> tuple[Any, Any, Any]:
    plt = pyplot()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7.5, 5))
    axes.grid(alpha=0.3)
    return plt, figure, axes


def _saved(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_baselines(results: Results, rows: Sequence[tuple[str, Sequence[Record], str]], path: Path) -> None:
    plt, figure, axes = _figure(path)
    for label, records, system in rows:
        on, off = (results.figure(records, system, metric) for metric in ("gap_closed", "general_kl"))
        if on is None or off is None:
            continue
        ours = label.startswith("**")
        axes.plot([off.value], [on.value], "*" if ours else "o", markersize=14 if ours else 6)
        axes.annotate(label.strip("*"), (off.value, on.value), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axes.set(xlabel="moved off the text: KL from the bare model, nats a token", ylabel="gap closed on the text")
    _saved(plt, figure, path)


def _plot_sizes(results: Results, quality: Sequence[Record], sizes: Sequence[Record], path: Path) -> None:
    plt, figure, axes = _figure(path)
    for document in dict.fromkeys(r["document"] for r in sizes):
        records = [r for r in [*quality, *sizes] if r["document"] == document]
        points = []
        for record in records:
            found = results.figure([record], "cartridge", "gap_closed")
            if found is not None:
                points.append((record["params"].get("shrink", 10), found))
        points.sort(key=lambda point: point[0])
        spread = [[f.value - f.low for _, f in points], [f.high - f.value for _, f in points]]
        axes.errorbar(
            [s for s, _ in points], [f.value for _, f in points], yerr=spread, marker="o", capsize=3, label=document
        )
    axes.axvline(38.6, linestyle=":", color="gray", label="the paper's 38.6×, parity (published)")
    axes.set(xscale="log", xlabel="times smaller than the text", ylabel="gap closed")
    axes.legend(fontsize=8)
    _saved(plt, figure, path)


def _plot_cost(costs: Sequence[Cost], path: Path) -> None:
    plt, figure, axes = _figure(path)
    counts = [10 ** (step / 20) for step in range(81)]
    for cost in costs:
        axes.plot(counts, [cost.total(count) for count in counts], label=cost.name)
    axes.set(xscale="log", yscale="log", xlabel="questions", ylabel="machine seconds in all, making included")
    axes.legend(fontsize=8)
    _saved(plt, figure, path)
