"""docs/results.md from the kept JSON lines: tables, plots, and a row for each claim of the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from peft_cartridges.evaluation.cost import Cost, questions_until_cheaper
from peft_cartridges.evaluation.report import markdown_table

from .claims import claims_section, published_section
from .plots import plot_baselines, plot_costs, plot_rows, plot_seconds, plot_sizes
from .records import Record, Results, Row, written

_ON = ("gap_closed", "gold_nll", "teacher_kl", "teacher_agreement", "choice_accuracy", "token_f1", "rouge_l", "chrf")
_OFF = (
    "general_kl", "general_agreement", "general_nll", "instructions_followed", "contamination", "abstained",
    "abstained_wrongly", "abstention_separation",
)  # fmt: skip
_SHORT = ("gap_closed", "teacher_kl", "general_kl")
# Group -> (title, the parameter that it varies, what the base has for it)
_VARIANTS = {
    "initializations": ("Initializations", "start", "attention_matching, the default"),
    "objective": ("KL against cross-entropy", "loss_type", "forward_kl, the default"),
    "seeds": ("Kinds of seed prompts", "seeds", None),
    "sink": ("Frozen first tokens", "frozen", "1, the default"),
}


def write_page(records: Sequence[Record], path: Path, *, cells: Sequence[str] = (), budget: str = "") -> Path:
    """Writes the page and its plots.

    Args:
        records: Of the cells that were run.
        path: Of the page; its plots go into the folder of its name beside it.
        cells: Names of all cells, so that the page says which were not run.
        budget: Of the run.
    """
    results = Results(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    plots = path.parent / path.stem
    parts = [
        _head(results, cells, budget),
        claims_section(results),
        _baselines(results, plots),
        _trained(results, plots),
    ]
    parts += [_off_context(results), _variants(results, plots), _cost(results, plots), published_section(), _recipe()]
    parts.append(_missing(records, cells))
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _head(results: Results, cells: Sequence[str], budget: str) -> str:
    records = results.records
    commands = list(dict.fromkeys(r["command"] for r in records if "command" in r))
    commits = list(dict.fromkeys(r["commit"] for r in records if "commit" in r))
    older = [c for c in dict.fromkeys(c for r in records for c in r.get("made_at", [])) if c not in commits]
    machines = list(dict.fromkeys(r["machine"] for r in records if "machine" in r))
    minutes = sum(r["seconds"] for r in records) / 60
    settings = next((r["settings"] for r in records if "settings" in r), {})
    told = (
        f" {settings['model']} in {settings['dtype']}; self-studies of {settings['conversations']} conversations, half of them "
        f"recitations, with answers of at most {settings['answer_tokens']} tokens, learned in {settings['steps']} steps of "
        f"{settings['batch_size']}; at most {settings['questions']} questions on each document and "
        f"{settings['general_prompts']} general prompts."
        if settings
        else ""
    )
    about = f" {', '.join(f'`{commit}`' for commit in commits)}" if commits else ""
    if older:
        about += f" (some of what they measure was made at {', '.join(f'`{commit}`' for commit in older)})"
    clock = (
        " Seconds are those that the process computed, over its threads: what the clock says on an idle machine."
        if any(r.get("clock") == "cpu" for r in records)
        else ""
    )
    small = (
        "\n\nThe small budget shows that everything runs, in some 50 minutes of one processor. Its self-studies are a fraction of what `cartridges "
        "train` makes by default, too short to gain on what a cartridge begins with: what more of it gives is in "
        "[training.md](training.md)."
        if budget == "small"
        else ""
    )
    return (
        f"# Results\n\nWritten by `python -m benchmarks.results` from the lines in [results/](results/): the {budget or 'given'} "
        f"budget, {len(records)}{f' of {len(cells)}' if cells else ''} cells, {minutes:.0f} minutes of computing"
        f"{f' ({chr(59).join(machines)})' if machines else ''}, at commit{about or ' –'}.{told}{small}\n\n"
        + "".join(f"    {command}\n" for command in commands)
        + "\nA figure is *value [95 % interval]*: the mean over documents; the interval is over the questions (or prompts) of "
        "the documents, and over documents where there are at least six. *n* is documents / items. **Gap closed** is the share "
        "of the way from no context to the whole text in context, in the gold answers' negative log-likelihood: 100 % is as "
        "good as the text. SmolLM2-135M answers few questions right even with the text in front of it, so likelihoods and "
        f"divergences say more here than generated answers do. Each figure is of a single training run.{clock}"
    )


def _baselines(results: Results, plots: Path) -> str:
    records = results.of("baselines")
    if not records:
        return ""
    documents = {r["document"] for r in records}
    trained = [r for r in results.of("quality") if r["document"] in documents]
    lora, presses = results.of("lora"), results.of("presses")
    rows: list[Row] = [(name, records, name) for name in results.systems(records)]
    rows.insert(2, ("**cartridge, trained**", trained, "cartridge"))
    rows += [(name, presses, name) for name in results.systems(presses) if name not in ("no context", "full text")]
    rows.append(("LoRA of equal bytes", lora, "LoRA"))
    table = results.table(rows, ("gap_closed", "gold_nll", "teacher_kl", "teacher_agreement", "choice_accuracy"))
    off = results.table(rows, ("general_kl", "general_agreement", "general_nll"))
    sizes = markdown_table(
        ["", "keys and values", "to make"],
        [
            [label, f"{results.facts(of, str(name), 'kv_bytes') / 1e6:,.1f} MB", f"{results.facts(of, str(name), 'seconds'):,.1f} s"]
            for label, of, name in rows
            if not math.isnan(results.facts(of, str(name), "kv_bytes"))
        ],
    )  # fmt: skip
    reasons = "\n".join(
        # What a library says behind its first sentence is advice on how to use it.
        f"- {', '.join(names)}: {reason.split('. ')[0]}"
        for reason, names in results.reasons([*records, *presses, *lora]).items()
    )
    plot_baselines(results, rows, plots / "baselines.png")
    text = ", ".join(f"{r['document']} ({results.text_tokens(r):,} tokens)" for r in records)
    return (
        f"## Against what one would do instead\n\nEach with the keys and values of a tenth of the text's tokens where it has "
        f"a size (LoRA: as many bytes), on {text}; rows of n = 1 on the first of them alone.\n\n![gap closed against drift]({plots.name}/baselines.png)\n\n{table}\n\n"
        f"Off the text, on prompts that have nothing to do with it:\n\n{off}\n\nSizes, and seconds to make them on this machine "
        f"(of the cartridge: training alone; of retrieval: its index; kvpress, which has a process of its own, and LoRA by the wall clock, so with whatever else ran there):\n\n{sizes}"
        + (f"\n\nNot measured:\n\n{reasons}" if reasons else "")
    )


def _trained(results: Results, plots: Path) -> str:
    quality, sizes, seconds = results.of("quality"), results.of("sizes"), results.of("seconds")
    if not quality:
        return ""
    measured = {r["document"] for r in sizes}
    compared = [r for r in quality if r["document"] in measured] if sizes else quality
    by_size = sorted({r["params"]["shrink"] for r in sizes} | {10})
    rows: list[Row] = [("full text", compared, "full text")]
    rows += [(f"1/{s}", compared if s == 10 else results.of("sizes", shrink=s), "cartridge") for s in by_size]
    parts = ["## Quality against size and training time", results.table(rows, _ON)]
    if len(by_size) > 1:
        plot_sizes(results, compared, sizes, plots / "sizes.png")
        parts.append(f"![quality against size]({plots.name}/sizes.png)")
    runs = [*quality, *sizes, *seconds]
    parts.append("Every run, with what it took on this machine:")
    parts.append(
        markdown_table(
            ["", "document", "tokens", "steps", "writing", "start", "training", "gap closed"],
            [
                [
                    f"1/{r['params'].get('shrink', 10)}", r["document"], f"{r['num_tokens']:,} of {r['text_tokens']:,}", str(r["steps"]),
                    *(f"{r[name]:,.0f} s" if "clock" in r else "–" for name in ("synthesis_seconds", "start_seconds", "train_seconds")),
                    written(results.figure([r], "cartridge", "gap_closed"), ".0%"),
                ]
                for r in runs
            ],
        )
    )  # fmt: skip
    if seconds:
        timed = [r for r in quality if r["document"] in {s["document"] for s in seconds}]
        plot_seconds(results, [r for r in (*seconds, *timed) if "clock" in r], plots / "seconds.png")
        parts.append(f"![quality against seconds of training]({plots.name}/seconds.png)")
    return "\n\n".join(parts)


def _off_context(results: Results) -> str:
    records = results.of("quality")
    if not records:
        return ""
    rows: list[Row] = [(n, records, n) for n in ("no context", "full text", "cartridge")]
    rows.append(("LoRA of equal bytes", results.of("lora"), "LoRA"))
    return (
        "## Off the text\n\nOn general prompts: how far the model moves from itself, whether it still follows instructions, "
        "whether words that only the text has come up (*contamination*), and whether it tells questions that the text does "
        f"not answer from those that it does.\n\n{results.table(rows, _OFF)}"
    )


def _variants(results: Results, plots: Path) -> str:
    parts = []
    for group, (title, param, base) in _VARIANTS.items():
        records = results.of(group)
        if not records:
            continue
        documents = {r["document"] for r in records}
        rows: list[Row] = []
        if base is not None:
            rows.append((base, [r for r in results.of("quality") if r["document"] in documents], "cartridge"))
        for value in dict.fromkeys(r["params"][param] for r in records):
            rows.append((str(value), results.of(group, **{param: value}), "cartridge"))
        text = f"## {title}\n\nAfter training.\n\n{results.table(rows, _SHORT)}"
        if group == "initializations":
            untrained = [r for r in results.of("baselines") if r["document"] in documents]
            before: list[Row] = [
                (n, untrained, n) for n in results.systems(untrained) if n.startswith(("untrained", "first"))
            ]
            plot_rows(results, rows, plots / "initializations.png", "gap_closed", "gap closed after training")
            text += f"\n\n![initializations]({plots.name}/initializations.png)"
            if before:
                text += f"\n\nBefore it, on the same documents:\n\n{results.table(before, _SHORT)}"
        parts.append(text)
    for group, title, about in (
        ("composition", "Composition", "Cartridges that were trained apart, on the questions of one of them: alone, and by depth and order."),
        ("parts", "One text in parts", "Two halves with a cartridge each, half as long and trained half as long, one behind the other; the cartridge of the whole for comparison."),
        ("long", "Texts beyond the window", "A text longer than the model's window of 8,192 tokens: the cartridge, as much of the text as fits, and others of the cartridge's size. There is no full text in context, so there is no gap: the gold answers' likelihood decides."),
    ):  # fmt: skip
        if records := results.of(group):
            rows = [(name, records, name) for name in results.systems(records)]
            if group == "parts":
                documents = {r["document"] for r in records}
                rows.append(
                    ("one cartridge", [r for r in results.of("quality") if r["document"] in documents], "cartridge")
                )
            on = ", ".join(f"{r['document']} ({results.text_tokens(r):,} tokens)" for r in records)
            parts.append(
                f"## {title}\n\n{about} On {on}.\n\n{results.table(rows, ('gap_closed', 'gold_nll', 'teacher_kl', 'general_kl'))}"
            )
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
            counts = [questions_until_cheaper(found[0], cost, unit) for unit in ("seconds", "flops")]
            shown = ["never" if math.isinf(count) else f"{count:,.0f}" for count in counts]
            rows.append(
                [f"1/{size} against {cost.name}", f"{found[0].making_seconds / 60:.1f} min", f"{found[0].seconds:.2f} s", f"{cost.seconds:.2f} s", *shown]
            )  # fmt: skip
    plot_costs(costs["10"], plots / "break_even.png")
    machine = record["machine_measured"]
    checks = [
        [what, f"{told:,.2f} s", f"{measured:,.2f} s", f"{measured / told:.2f}"]
        for what, told, measured in record["seconds_told_and_measured"]
    ]
    checks += [
        [what, f"{told:,.0f}", f"{measured:,.0f}", f"{measured / told:.2f}"]
        for what, told, measured in record["bytes_told_and_measured"]
    ]
    return (
        f"## When it pays\n\nBy the cost model (`cartridges cost`), {record['document']}, {record['text_tokens']:,} tokens, with "
        f"the speed that was measured on this machine right before: {machine['flops'] / 1e9:,.0f} GFLOP/s in a prefill of 512 tokens, "
        f"{machine['bandwidth'] / 1e9:,.1f} GB/s of weights in decoding. What it says of this budget's own run, and what that took:\n\n"
        + markdown_table(["", "the model says", "measured", "measured / said"], checks)
        + "\n\nIts FLOPs are those that PyTorch counts (`tests/evaluation/test_cost.py`). Machine seconds of making and of serving, "
        "eight users at a time, an answer of 100 tokens, and the questions from which on the cartridge has cost less in all:\n\n"
        + markdown_table(
            ["", "making", "a question", "a question, the other way", "cheaper from (time)", "(FLOPs)"], rows
        )
        + f"\n\n![break-even at a tenth]({plots.name}/break_even.png)"
    )


def _recipe() -> str:
    common = (
        "python -m benchmarks.results --budget full --device cuda --tasks longhealth quality --data DATA --documents 6"
    )
    lines = [
        f"    {common} \\\n        --conversations 4096 --steps 400 --model {model} --window {window}"
        for model, window in (("Qwen/Qwen3-4B", 40960), ("meta-llama/Llama-3.1-8B-Instruct", 131072))
    ]
    return (
        "## On a GPU: not run yet\n\nLongHealth (`DATA/longhealth.json`, its `benchmark_v5.json`) and QuALITY, with models "
        "that answer, on a device with 80 GB. `make results-gpu DATA=DATA` runs both; each writes its own page.\n\n"
        + "\n".join(lines)
    )


def _missing(records: Sequence[Record], cells: Sequence[str]) -> str:
    done = {r["name"] for r in records}
    missing = [name for name in cells if name not in done]
    if not missing:
        return ""
    return "## Cells that were not run\n\nThe same command carries on with them.\n\n" + "\n".join(
        f"- {name}" for name in missing
    )
