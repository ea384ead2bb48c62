"""What size, budget and off-context share do to a cartridge: on the text, and off it. One JSON line a run.

    python -m benchmarks.choosing qasper-10 qasper-16 --data DATA --run off_context_share=0 --run off_context_share=0.05
    python -m benchmarks.choosing loogle-0 --data DATA --run num_tokens=768 budget=12m
    python -m benchmarks.choosing --table --plot docs/choosing.png

A run trains a cartridge with the trainer's defaults and its own settings (`num_tokens` or `shrink`, otherwise those of
`SelfStudyConfig`), and measures: the share of the gap in the gold answers' likelihood between no context and the text in
context (of a text beyond the window: as many first tokens as `--fits` says) that it closes; the KL of the bare model from
the model with the cartridge on prompts that have nothing to do with the text, as a multiple of what the text in context
does there, with and without its gate; and BM25 passages of as many tokens. With `--held-out N` also the share of the gap
in KL on N free conversations of another seed, with `--quantize int8 int4` the gap closed by the cartridge as it comes back
from such a file. Runs that are in `--output` already are left out, one that was stopped goes on at its last checkpoint
(its time is then not told), and conversations are written once for all runs on a document, unless they have a `budget`; what
writing took is told with each of these runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.harness import DEFAULT_MODEL, git_commit, print_table
from benchmarks.initialization import as_stored
from peft_cartridges import (
    CartridgeConfig,
    Gate,
    KVPrefix,
    SelfStudyConfig,
    SelfStudySynthesizer,
    SelfStudyTrainer,
    SynthesisConfig,
)
from peft_cartridges.atomic_files import write_text
from peft_cartridges.chat import ChatCodec
from peft_cartridges.evaluation import Bench, Document, load_task, prefix_system
from peft_cartridges.evaluation.baselines import get_baseline
from peft_cartridges.evaluation.scoring import compare_rows, predictions, row_of_answer, score_rows
from peft_cartridges.evaluation.system import System, bare_system
from peft_cartridges.evaluation.tasks import general_pairs

TASKS = {"qasper": "qasper", "quality": "quality", "toefl": "documents", "loogle": "loogle_short"}
# Prompts that have nothing to do with a text; longer ones are left out.
_GENERAL, _LONGEST = 64, 800
_LONG = 7_900  # tokens with which a text no longer fits into 8,192 with its questions


class Measured:
    """A document with its references.

    Args:
        args: Of the command line.
        document: The text and its questions.
    """

    def __init__(self, args: argparse.Namespace, document: Document) -> None:
        self.args, self.document = args, document
        self.tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
        self.model: Any = model.to(args.device)
        self.codec = ChatCodec.of(self.model, self.tokenizer)
        self.ids = self.codec.encode_context(document.text)
        pairs = [p for p in general_pairs(args.data and args.data / "general.jsonl") if len(p["prompt"]) < _LONGEST]
        self.prompts = [pair["prompt"] for pair in pairs[:_GENERAL]]
        self.general = [row_of_answer(self.codec, p["prompt"], p["answer"][:_LONGEST]) for p in pairs[:_GENERAL]]
        self.asked = [row_of_answer(self.codec, q.question, q.answers[0]) for q in document.answerable]
        bare = bare_system(self.model, self.codec)
        self.states = predictions(bare, self.general)
        self.no_context = self.nll(bare)
        # Of a text beyond the window what fits is read.
        read = self.ids if len(self.ids) <= _LONG else self.ids[: args.fits]
        text = prefix_system("text", self.model, self.codec, KVPrefix.from_input_ids(self.model, read))
        self.full, self.full_off = self.nll(text), self.off_context(text)

    def nll(self, system: System) -> float:
        scores = score_rows(system, self.asked)
        return sum(score.nll for score in scores) / sum(score.tokens for score in scores)

    def off_context(self, system: System, gate: Gate | None = None) -> float:
        """With a gate, what it rejects is answered by the bare model."""
        found = compare_rows(system, self.general, self.states)
        behind = [gate is None or gate.accepts(prompt) for prompt in self.prompts]
        kls = [row.kl for row, is_behind in zip(found, behind, strict=True) if is_behind]
        return sum(kls) / sum(row.tokens for row in found)

    def closed(self, nll: float) -> float:
        return (self.no_context - nll) / (self.no_context - self.full)

    def passages(self, num_tokens: int) -> float:
        """Share of the gap that BM25 passages close."""
        bench = Bench(self.model, self.tokenizer, self.document.text, num_tokens)
        return self.closed(self.nll(get_baseline("bm25")(bench)))

    def _conversations(self, settings: SynthesisConfig) -> tuple[Dataset, float | None]:
        """Written once for all runs, and the seconds that it took; `None` where a run that was stopped had begun."""
        synthesizer = SelfStudySynthesizer(self.model, self.tokenizer, settings)
        address = synthesizer.address(self.document.text)[:12]
        folder = self.args.work / self.document.id / "conversations" / f"{address}-{settings.off_context_share:g}"
        spent, begun, start = folder / "seconds.json", folder.exists(), time.perf_counter()
        dataset = synthesizer.synthesize(self.document.text, output_dir=folder)
        if not spent.exists():
            write_text(spent, json.dumps(None if begun else round(time.perf_counter() - start, 1)))
        return dataset, json.loads(spent.read_text(encoding="utf-8"))

    def carry_out(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Trains and measures one run."""
        own = dict(settings)
        num_tokens = own.pop("num_tokens", None) or max(2, round(len(self.ids) / own.pop("shrink", 10)))
        commit = git_commit()
        decides = [settings, self.args.dtype, self.args.device, str(self.args.model), commit]
        key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]
        args = SelfStudyConfig(
            output_dir=str(self.args.work / self.document.id / key), save_steps=20, save_total_limit=1,
            logging_steps=10, plot=False, use_cpu=self.args.device == "cpu", report_to="none", **own,
        )  # fmt: skip
        held_out = None
        if self.args.held_out:
            free = {"recitation_share": 0.0, "off_context_share": 0.0, "synthesis_seed": 1}
            held_out, _ = self._conversations(SynthesisConfig(num_conversations=self.args.held_out, **free))
        conversations, written = Dataset.from_dict({"text": [self.document.text]}), None
        if not args.budget:
            conversations, written = self._conversations(SynthesisConfig.from_args(args))
        start = time.perf_counter()
        trainer = SelfStudyTrainer(
            self.model, args, conversations, held_out, processing_class=self.tokenizer, peft_config=CartridgeConfig(num_tokens=num_tokens),
            corpus=None if args.budget else self.document.text,
        )  # fmt: skip
        last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        seconds = time.perf_counter() - start
        conversations_closed = trainer.evaluate()["eval_conversation_gap_closed"] if held_out else None
        prefix = trainer.model.get_kv_prefix().detach().to(self.model.dtype)
        stored = {
            scheme: trainer.model.get_kv_prefix().detach() for scheme, _ in as_stored(trainer.model, self.args.quantize)
        }
        history = trainer.state.log_history
        if args.budget:
            said = [entry["synthesis/seconds"] for entry in history if "synthesis/seconds" in entry]
            written, seconds = said[0] if said else None, seconds - (said[0] if said else 0)
        self.model = trainer.model.unload().eval()
        cartridge = prefix_system("cartridge", self.model, self.codec, prefix)
        nll = self.nll(cartridge)
        quantized = {
            scheme: self.closed(self.nll(prefix_system(scheme, self.model, self.codec, kept.to(self.model.dtype))))
            for scheme, kept in stored.items()
            if scheme in self.args.quantize
        }
        gate = Gate.make(self.document.text, self.tokenizer)
        return {
            "document": self.document.id, "text_tokens": len(self.ids), "num_tokens": num_tokens, "settings": settings,
            "conversations": len(trainer.train_dataset), "steps": trainer.state.global_step,
            "learning_rate": trainer.args.learning_rate, "off_context_share": trainer.args.off_context_share,
            "synthesis_seconds": written, "seconds": None if last else round(seconds, 1),
            "no_context": self.no_context, "full": self.full, "nll": nll, "closed": self.closed(nll),
            "off_context_kl": self.off_context(cartridge), "full_off_context_kl": self.full_off,
            "gated_off_context_kl": self.off_context(cartridge, gate),
            "gate_accepts": sum(gate([q.question for q in self.document.answerable])) / len(self.asked),
            "gate_rejects": 1 - sum(gate(self.prompts)) / len(self.prompts),
            "conversations_closed": conversations_closed, "quantized": quantized,
            "losses": [round(entry["loss"], 4) for entry in history if "loss" in entry], "questions": len(self.asked),
            **_measured_with(self.args), "threads": torch.get_num_threads(), "commit": commit,
        }  # fmt: skip


def show(records: list[dict[str, Any]]) -> None:
    """Markdown, a row a run."""
    rows = [
        [
            record["document"],
            f"{record['num_tokens']} of {record['text_tokens']:,}",
            ", ".join(f"{name}={value}" for name, value in record["settings"].items()),
            record["conversations"],
            record["steps"],
            *(f"{record[part] / 60:.1f} min" if record[part] else None for part in ("synthesis_seconds", "seconds")),
            f"{record['closed']:.1%}",
            f"{record['bm25']:.1%}",
            f"{record['off_context_kl']:.3f}",
            f"{record['off_context_kl'] / record['full_off_context_kl']:.2f}",
            f"{record['gated_off_context_kl'] / record['full_off_context_kl']:.2f}",
            f"{record['conversations_closed']:.1%}" if record["conversations_closed"] else None,
            f"{record['gate_accepts']:.0%}, {record['gate_rejects']:.0%}",
            ", ".join(f"{scheme} {closed:.1%}" for scheme, closed in record["quantized"].items()),
        ]
        for record in records
    ]
    header = [
        "text",
        "tokens",
        "settings",
        "conversations",
        "steps",
        "writing",
        "training",
        "gap closed",
        "BM25",
        "KL off context",
    ]
    print_table(
        [*header, "of the text's", "with the gate", "conversations", "gate accepts, rejects", "quantized"], rows
    )


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """What each cartridge closes of the gap beside passages of as many tokens, and what it changes off the text, in
    multiples of what the text in context changes there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [f"{record['document']}\n1/{record['text_tokens'] / record['num_tokens']:.0f}" for record in records]
    figure, (on, off) = pyplot.subplots(2, 1, figsize=(max(6, 1.1 * len(records)), 7), sharex=True)
    places = range(len(records))
    for axes, bars in (
        (on, {"cartridge": "closed", "BM25 passages": "bm25"}),
        (off, {"cartridge": "off_context_kl", "with its gate": "gated_off_context_kl"}),
    ):
        for number, (label, name) in enumerate(bars.items()):
            heights = [record[name] / (1 if axes is on else record["full_off_context_kl"]) for record in records]
            axes.bar([place + 0.4 * number - 0.2 for place in places], heights, 0.4, label=label)
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--", label="the text in context")
        axes.legend(frameon=False)
    on.set_ylabel("share of the gap closed")
    off.set_ylabel("KL off the text (the text's = 1)")
    off.set_xticks(list(places), names, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    print(f"Written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="*", metavar="DOCUMENT", help="qasper-10, quality-2, toefl-0, loogle-0, …")
    parser.add_argument("--run", nargs="*", action="append", default=[], metavar="NAME=VALUE", help="settings of a run")
    parser.add_argument("--data", type=Path, help="folder with the tasks' rows, instead of the Hub")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fits", type=int, default=7_000, help="tokens of a text beyond the window that are read")
    parser.add_argument("--held-out", type=int, default=0, help="free conversations to measure with")
    parser.add_argument("--quantize", nargs="*", default=[], choices=["int8", "int4", "fp8"])
    parser.add_argument("--output", type=Path, default=Path("outputs/choosing.jsonl"), help="the JSON lines")
    parser.add_argument("--work", type=Path, default=Path("outputs/choosing"), help="conversations")
    parser.add_argument("--table", action="store_true", help="print the output as a table and stop")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the output, and stop")
    args = parser.parse_args()
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.exists() else []
    records = [json.loads(line) for line in lines]
    if args.table or args.plot:
        if args.table:
            show(records)
        if args.plot:
            plot(records, args.plot)
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = {(record["document"], json.dumps(record["settings"])) for record in records if _is_alike(record, args)}
    for name in args.documents:
        task = name.split("-")[0]
        documents = load_task(TASKS[task], args.data and args.data / f"{task}.jsonl")
        runs = [dict(pair.split("=", 1) for pair in run) for run in args.run or [[]]]
        wanted = [{key: _value(value) for key, value in run.items()} for run in runs]
        wanted = [run for run in wanted if (name, json.dumps(run)) not in done]
        if not wanted:
            continue
        measured = Measured(args, next(document for document in documents if document.id == name))
        for run in wanted:
            record = measured.carry_out(run)
            record["bm25"] = measured.passages(record["num_tokens"])
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            show([record])


def _measured_with(args: argparse.Namespace) -> dict[str, Any]:
    """What decides a record besides the document and the run's own settings."""
    model = Path(args.model).name
    return {name: getattr(args, name) for name in ("dtype", "device", "fits", "held_out")} | {"model": model}


def _is_alike(record: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether the command line asks for nothing else than what the record was measured with."""
    asked = _measured_with(args)
    return {name: record.get(name) for name in asked} == asked and set(args.quantize) <= set(record["quantized"])


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()
