"""The paper's claims (arXiv 2506.06266v3) beside our figures, and what others report of what is not run here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peft_cartridges.evaluation import Estimate
from peft_cartridges.evaluation.report import markdown_table

from .records import Record, Results, written

# What is not run, why, and what its authors report: never beside our figures as if it were one of them.
PUBLISHED = (
    ("Cartridges (the paper)", "its models want GPUs", "38.6× less memory, 26.4× the throughput, at the quality of the text in context", "2506.06266"),
    ("MiniCache", "not in kvpress 0.5.5", "5.02× smaller with 4 bits, LLaMA-2-7B on ShareGPT", "2405.14366"),
    ("Doc-to-LoRA", "its hypernetwork is trained for other base models", "near-perfect needles beyond 4× the window", "2602.15902"),
    ("PALU", "decomposes the base model's own weights, model by model", "91 % smaller", "2407.21118"),
    ("Lexico", "wants dictionaries trained for each base model", "–", "2412.08890"),
    ("RestoreKV", "its adapters exist for Llama-3.1-8B and Qwen3-8B only; kvpress loads them there", "–", "2608.01247"),
    ("FINCH", "compresses for a known question; a cartridge answers unknown ones", "–", "2408.00167"),
    ("Mamba, RWKV, xLSTM, Hyena", "other models, not other ways to keep a text for this one", "–", "–"),
)  # fmt: skip

CONFIRMED, NOT, OPEN, NOT_RUN = "confirmed", "not confirmed", "not decidable here", "not run"


@dataclass(frozen=True)
class Claim:
    """A row of the table.

    Args:
        claim: In words.
        paper: Its figures.
        ours: Ours.
        verdict: By the rule that the text above the table states.
    """

    claim: str
    paper: str
    ours: str
    verdict: str


def claims_section(results: Results) -> str:
    rows = [[row.claim, row.paper, row.ours, row.verdict] for row in find_claims(results)]
    return (
        "## The paper's claims\n\nThe paper ([arXiv 2506.06266](https://arxiv.org/abs/2506.06266), version 3) measures "
        "Llama 3.2 3B and Llama 3.1 8B on LongHealth, MTOB and QASPER with texts of 100,000 to 484,000 tokens; ours are of "
        "another size altogether, so a row says whether the *direction* holds here. A row is *confirmed* where the 95 % "
        "interval says so: that of the share of the gap closed for the first three (at least 95 %), and that of the "
        "difference, question by question on the same documents, for the others. *Not confirmed* is the same the other way "
        "round; else it is *not decidable here*. Differences are in points of the gap closed, unless the row says otherwise.\n\n"
        + markdown_table(["claim", "the paper", "ours", "verdict"], rows, numbers=False)
    )


def find_claims(results: Results) -> list[Claim]:
    base, lora, long = results.of("quality"), results.of("lora"), results.of("long")

    def parity(claim: str, paper: str, records: Sequence[Record]) -> Claim:
        found = results.figure(records, "cartridge", "gap_closed")
        return Claim(claim, paper, written(found, ".0%"), _at_least(found, 0.95))

    def variant(claim: str, paper: str, group: str, *, other: Sequence[Record] = base, **params: object) -> Claim:
        """That the base, or `other`, is better than a variant of it."""
        return compared(claim, paper, other, results.of(group, **params), ("cartridge", "cartridge"))

    def compared(
        claim: str, paper: str, one: Sequence[Record], two: Sequence[Record], systems: tuple[str, str],
        metric: str = "gap_closed", *, less: bool = False, spec: str = "+.0%",
    ) -> Claim:  # fmt: skip
        found = results.difference(one, two, systems, metric)
        if found is None:
            return Claim(claim, paper, "–", NOT_RUN)
        shared = {r["document"] for r in two}
        both = [
            results.figure([r for r in records if r["document"] in shared], system, metric)
            for records, system in ((one, systems[0]), (two, systems[1]))
        ]
        plain = spec.replace("+", "")
        values = " against ".join("–" if value is None else format(value.value, plain) for value in both)
        return Claim(claim, paper, f"{values}: {written(found, spec)}", _differs(found, less=less))

    first = results.of("initializations", start="first_tokens")
    composed = results.of("composition")
    return [
        parity("as good as the text in context at a fraction of the memory", "38.6× less over its evaluations", results.of("sizes", shrink=38)),
        parity("(at a tenth)", "10× less on LongHealth, up to 100× on QASPER", base),
        parity("(at a fifth)", "–", results.of("sizes", shrink=5)),
        compared("better than the text's beginning, as long as the cartridge", "compression degrades from 2× on", base,
                 results.of("baselines"), ("cartridge", "first tokens")),
        compared("better than a summary of that length", "the same", base, results.of("baselines"), ("cartridge", "summary")),
        _throughput(results, base),
        variant("more training is better", "rises steadily with steps, at all sizes", "seconds", share=0.25),
        compared("a text beyond the window is learned: gold-answer NLL against the part that fits",
                 "484k tokens with a window of 128k, up to 11.0 chrF above baselines", long, long, ("cartridge", "what fits"),
                 "gold_nll", less=True, spec="+.2f"),
        compared("better on the text than a LoRA of its bytes", "+4.5 chrF on MTOB at 0.6 GB", base, lora, ("cartridge", "LoRA")),
        compared("moves the model less off the text than that LoRA: KL from the bare model, nats a token",
                 "MMLU 54.7 → 54.3, LoRA 54.7 → 45.3", base, lora, ("cartridge", "LoRA"), "general_kl", less=True, spec="+.2f"),
        variant("tokens of a text are a better start than random vectors", "55.3 % against 29.9 % on LongHealth", "initializations",
                other=first, start="random_vectors"),
        variant("the text's own first tokens are better than another text's", "55.3 % against 51.3 % (random tokens)",
                "initializations", other=first, start="unrelated_text"),
        variant("distillation is better than next-token prediction on the conversations", "33.5 against 24.9 chrF on MTOB",
                "objective", loss_type="cross_entropy"),
        compared("(the same, by the KL from the text in context)", "–", base, results.of("objective", loss_type="cross_entropy"),
                 ("cartridge", "cartridge"), "teacher_kl", less=True, spec="+.2f"),
        variant("five kinds of seed prompts are better than one", "48.4 against 43.6 on LongHealth; no difference on QASPER", "seeds",
                other=results.of("seeds", seeds=5), seeds=1),
        variant("a frozen first token helps", "training is more stable", "sink", frozen=0),
        compared("composed without training: better than another text's cartridge alone", "better than one cartridge, and than the texts cut to the window",
                 composed, composed, ("last of two", "another alone")),
    ]  # fmt: skip


def published_section() -> str:
    rows = [list(row) for row in PUBLISHED]
    return (
        "## Not run here, as published\n\nFigures of their authors, on their models and data: not comparable with ours.\n\n"
        + markdown_table(["", "why not here", "its authors report", "arXiv"], rows, numbers=False)
    )


def _at_least(found: Estimate | None, bar: float) -> str:
    if found is None:
        return NOT_RUN
    low = found.value if math.isnan(found.low) else found.low
    high = found.value if math.isnan(found.high) else found.high
    return CONFIRMED if low >= bar else NOT if high < bar else OPEN


def _differs(found: Estimate, *, less: bool) -> str:
    low, high = (-found.high, -found.low) if less else (found.low, found.high)
    if math.isnan(low):
        return OPEN
    return CONFIRMED if low > 0 else NOT if high < 0 else OPEN


def _throughput(results: Results, base: Sequence[Record]) -> Claim:
    timed = [record for record in base if "clock" in record]
    ours, text = (results.facts(timed, system, "tokens_per_second") for system in ("cartridge", "full text"))
    claim, paper = "more tokens per second than the text in context", "26.4×, at its largest batches"
    if math.isnan(ours) or math.isnan(text):
        return Claim(claim, paper, "–", NOT_RUN)
    told = f"{ours / text:.1f}× (8 rows, one copy of the text for all; a copy for each row: performance.md)"
    return Claim(claim, paper, told, CONFIRMED if ours > text else NOT)
