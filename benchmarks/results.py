"""The evidence: every figure of docs/results.md, one resumable command.

    python -m benchmarks.results --budget small
    python -m benchmarks.results --budget full --data DATA --kvpress-python kvpress-env/bin/python
    python -m benchmarks.results --minutes 8 --only baselines        # as much as fits, then the page from what is there
    python -m benchmarks.results --list

Each cell is a JSON line in `--output`; cells that are there are left out, so the same command carries on after a stop.
The page is written anew from the lines at the end of each run, also after Ctrl-C. Documents: the two of `examples/data`,
and those of QASPER, QuALITY and LooGLE, from the Hub or from `--data FOLDER` (`qasper.jsonl`, `quality.jsonl`,
`loogle.jsonl`, `general.jsonl`, `longhealth.json`; rows as in `peft_cartridges.evaluation.tasks`). Lines hold numbers only, no text.

On GPUs, with a model that answers rather than one that only likelihoods can tell apart (not run yet):

    python -m benchmarks.results --budget full --model Qwen/Qwen3-4B --device cuda --tasks longhealth quality \
        --data DATA --window 40960 --documents 6 --conversations 4096 --steps 400 --output outputs/qwen3-4b.jsonl --page outputs/qwen3-4b.md
    python -m benchmarks.results --budget full --model meta-llama/Llama-3.1-8B-Instruct --device cuda \
        --tasks longhealth quality --data DATA --window 131072 --documents 6 --conversations 4096 --steps 400 \
        --output outputs/llama-3.1-8b.jsonl --page outputs/llama-3.1-8b.md
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.results_page import write_page
from peft_cartridges import (
    CartridgeConfig,
    KVPrefix,
    SelfStudyConfig,
    SelfStudySynthesizer,
    SelfStudyTrainer,
    SynthesisConfig,
    initialize_cartridge,
)
from peft_cartridges.chat import ChatCodec
from peft_cartridges.evaluation import (
    Bench,
    Document,
    EvaluationConfig,
    EvaluationReport,
    Making,
    ModelShape,
    System,
    Traffic,
    compare_costs,
    evaluate_systems,
    list_baselines,
    load_task,
    measure_machine,
)
from peft_cartridges.evaluation.documents import document_from_row
from peft_cartridges.evaluation.instructions import make_instructions
from peft_cartridges.evaluation.measurements import Items
from peft_cartridges.evaluation.report import SystemResult
from peft_cartridges.evaluation.system import prefix_system
from peft_cartridges.evaluation.tasks import general_pairs, unanswerable_from
from peft_cartridges.initialization import list_strategies

ROOT = Path(__file__).parents[1]
BUDGETS = ("small", "medium", "full")
OWN = ("lighthouse_handbook", "orchard_cooperative")
# Of every trained cell that does not say otherwise: what docs/training.md found to work on this model.
BASE: dict[str, Any] = {"shrink": 10, "recitation_share": 0.5}


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Args:
        group: What it is compared with; a section of the page.
        kind: Which method of `Run` carries it out.
        document: On which.
        params: What makes it another than the base.
        budget: From which budget on it is run.
    """

    group: str
    kind: str
    document: str
    params: tuple[tuple[str, Any], ...] = ()
    budget: str = "small"

    @property
    def name(self) -> str:
        settings = ",".join(f"{key}={value}" for key, value in self.params)
        return f"{self.group}/{self.document}" + (f"/{settings}" if settings else "")


def plan(documents: list[str], long: list[str]) -> list[Cell]:
    """All cells, cheapest evidence first."""

    def trained(group: str, document: str, budget: str, **params: Any) -> Cell:
        return Cell(group, "trained", document, tuple(sorted(params.items())), budget)

    first = documents[0]
    cells = [Cell("cost", "cost", first)]
    cells += [trained("quality", first, "small")]
    cells += [Cell("baselines", "baselines", document) for document in documents]
    cells += [Cell("presses", "presses", document, (), "medium") for document in documents]
    cells += [trained("quality", document, "medium") for document in documents[1:]]
    cells += [Cell("lora", "lora", document, (), "medium" if document in OWN else "full") for document in documents]
    cells += [trained("sizes", d, "medium" if d == first else "full", shrink=s) for d in documents for s in (5, 20, 38)]
    cells += [trained("seconds", first, "medium", shrink=10, share=share) for share in (0.25, 0.5, 2.0)]
    starts = [name for name in list_strategies() if name not in ("auto", "most_attended", "pretrained")]
    for start in (*starts, "unrelated_text"):
        cells += [trained("initializations", d, "medium" if d == first else "full", start=start) for d in documents[:4]]
    cells += [trained("objective", d, "full", loss_type="cross_entropy") for d in documents]
    cells += [trained("seeds", d, "full", seeds=n, recitation_share=0.0) for d in documents[:4] for n in (1, 5)]
    cells += [trained("sink", d, "full", frozen=n) for d in documents[:4] for n in (0, 4)]
    pairs = list(zip(documents[::2], documents[1::2], strict=False))
    cells += [
        Cell("composition", "composition", a, (("other", b),), "medium" if a == first else "full") for a, b in pairs
    ]
    cells += [Cell("parts", "parts", document, (("parts", 2),), "full") for document in documents[:4]]
    cells += [Cell("long", "beyond_window", document, (), "full") for document in long]
    return cells


@dataclass
class Run:
    """Carries out cells.

    Args:
        args: Of the command line.
        documents: By name.
        general: Pairs that have nothing to do with them.
    """

    args: argparse.Namespace
    documents: dict[str, Document]
    general: list[dict[str, str]]

    def __post_init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.args.model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=getattr(torch, self.args.dtype))
        self.model = self.model.to(self.args.device).eval()
        self.codec = ChatCodec.of(self.model, self.tokenizer)
        self.work: Path = self.args.work
        self.work.mkdir(parents=True, exist_ok=True)

    def carry_out(self, cell: Cell) -> dict[str, Any]:
        start = time.perf_counter()
        self._partial = self.work / "partial" / f"{cell.name.replace('/', '+')}.jsonl"
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        figures = getattr(self, cell.kind)(cell.document, **dict(cell.params))
        self._partial.unlink(missing_ok=True)
        return {
            "name": cell.name, "group": cell.group, "document": cell.document, "params": dict(cell.params),
            "seconds": round(time.perf_counter() - start, 1), "model": self.args.model, "dtype": self.args.dtype,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.args.device}", **figures,
        }  # fmt: skip

    # -- kinds of cells ----------------------------------------------------------------------------------------------

    def baselines(self, document: str) -> dict[str, Any]:
        """Everything that needs no training, at a tenth of the text."""
        left_out = {"lora", *self.args.skip}
        names = [name for name in list_baselines() if name not in left_out and not name.startswith("kvpress_")]
        return {"report": self._evaluate(document, [], names, shrink=BASE["shrink"])}

    def presses(self, document: str) -> dict[str, Any]:
        """kvpress, at a tenth of the text."""
        names = [name for name in list_baselines() if name.startswith("kvpress_")]
        return {"report": self._evaluate(document, [], names, shrink=BASE["shrink"])}

    def trained(self, document: str, **params: Any) -> dict[str, Any]:
        """A cartridge by self-study, measured with generated answers where it is the base."""
        prefix, facts = self._train(document, self.documents[document].text, **params)
        system = prefix_system("cartridge", self.model, self.codec, prefix, seconds=facts["train_seconds"])
        report = self._evaluate(
            document, [system], [], generate=not params, shrink=params.get("shrink", BASE["shrink"])
        )
        return {"report": report, **facts}

    def lora(self, document: str) -> dict[str, Any]:
        """LoRA of equal bytes, the same conversations and steps, with the bare model's drift beside the cartridge's."""
        conversations, seconds = self._conversations(document, self.documents[document].text, BASE)
        report = self._evaluate(
            document, [], ["lora"], generate=document in OWN, shrink=BASE["shrink"], conversations=conversations,
            steps=self.args.steps,
        )  # fmt: skip
        return {"report": report, "synthesis_seconds": seconds}

    def composition(self, document: str, other: str) -> dict[str, Any]:
        """Two cartridges that were trained apart, one behind the other, in both orders, on the first one's questions."""
        mine, _ = self._train(document, self.documents[document].text)
        theirs, _ = self._train(other, self.documents[other].text)
        systems = [
            prefix_system(name, self.model, self.codec, prefix)
            for name, prefix in (
                ("alone", mine),
                ("first of two", KVPrefix.concatenate([mine, theirs[1:]])),
                ("second of two", KVPrefix.concatenate([theirs, mine[1:]])),
                ("the other alone", theirs),
            )
        ]
        return {"report": self._evaluate(document, systems, [], shrink=BASE["shrink"])}

    def parts(self, document: str, parts: int) -> dict[str, Any]:
        """One text in parts, a cartridge each, together as long as the cartridge of the whole."""
        text = self.documents[document].text
        cut = [text.rfind(" ", 0, len(text) * i // parts + 1) for i in range(1, parts)]
        pieces = [text[a:b] for a, b in zip([0, *cut], [*cut, len(text)], strict=True)]
        prefixes = [self._train(f"{document}-part{i}", piece)[0] for i, piece in enumerate(pieces)]
        joined = KVPrefix.concatenate([prefixes[0], *(prefix[1:] for prefix in prefixes[1:])])
        system = prefix_system(f"{parts} parts", self.model, self.codec, joined)
        return {"report": self._evaluate(document, [system], [], shrink=BASE["shrink"])}

    def beyond_window(self, document: str) -> dict[str, Any]:
        """A text beyond the window: against as much of it as fits, and retrieval of as many tokens."""
        prefix, facts = self._train(document, self.documents[document].text, num_tokens=768)
        bench = self._bench(document, 768)
        fits = KVPrefix.from_input_ids(self.model, bench.text_ids[: (bench.window or 8192) - 512])
        systems = [
            prefix_system("what fits", self.model, self.codec, fits),
            prefix_system("cartridge", self.model, self.codec, prefix, seconds=facts["train_seconds"]),
        ]
        return {"report": self._evaluate(document, systems, ["bm25", "first_tokens"], num_tokens=768), **facts}

    def cost(self, document: str) -> dict[str, Any]:
        """The cost model with this machine's measured speed, for the trained cells to be held against."""
        config = self.model.config
        size = torch.empty(0, dtype=getattr(torch, self.args.dtype)).element_size()
        shape, machine = ModelShape.of(config, dtype_bytes=size), measure_machine(self.model)
        tokens = len(self.codec.encode_context(self.documents[document].text))
        making = Making(
            conversations=self.args.conversations, generated_share=1 - BASE["recitation_share"],
            epochs=self.args.steps * 16 / self.args.conversations,
        )  # fmt: skip
        found = {}
        for shrink in (5, 10, 20, 38):
            costs = compare_costs(
                shape, machine, text_tokens=tokens, num_tokens=max(2, tokens // shrink), making=making,
                traffic=Traffic(batch_size=8, passage_tokens=max(2, tokens // shrink)),
            )  # fmt: skip
            found[str(shrink)] = [asdict(cost) for cost in costs]
        return {"machine_measured": asdict(machine), "text_tokens": tokens, "making": asdict(making), "costs": found}

    # -- what they share ---------------------------------------------------------------------------------------------

    def _bench(self, document: str, num_tokens: int, **options: Any) -> Bench:
        others = [name for name in self.documents if name != document]
        return Bench(
            self.model, self.tokenizer, self.documents[document].text, num_tokens,
            unrelated_text=self.documents[others[0]].text if others else "", kvpress_python=self.args.kvpress_python,
            encoder=self.args.encoder, **options,
        )  # fmt: skip

    def _evaluate(
        self, document: str, systems: list[System], baselines: list[str], *, generate: bool = False, shrink: int = 10,
        num_tokens: int | None = None, **options: Any,
    ) -> dict[str, Any]:  # fmt: skip
        given = self.documents[document]
        tokens = len(self.codec.encode_context(given.text))
        config = EvaluationConfig(
            max_questions=self.args.questions, max_general_prompts=self.args.general_prompts, generate=generate, max_new_tokens=32, speed=generate,
            abstention=generate,
        )  # fmt: skip
        # What a stop within a cell leaves is carried on from too.
        kept = {name: result_from_dict(row) for name, row in read_records(self._partial).items()}

        def keep(name: str, result: SystemResult) -> None:
            with self._partial.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**asdict(result), "system": result.name, "name": name}) + "\n")

        report: EvaluationReport = evaluate_systems(
            systems, self._bench(document, num_tokens or max(2, tokens // shrink), **options),
            questions=given.answerable, general=self.general, baselines=baselines, args=config,
            instructions=make_instructions([pair["prompt"] for pair in self.general[: self.args.general_prompts]]) if generate else (),
            unanswerable=unanswerable_from(list(self.documents.values()), given)[: self.args.questions or None] if generate else (),
            progress=lambda name: print(f"    {name}", file=sys.stderr, flush=True), kept=kept, finished=keep,
        )  # fmt: skip
        return _rounded(report.to_dict())

    def _train(self, name: str, text: str, **params: Any) -> tuple[KVPrefix, dict[str, Any]]:
        """A trained cartridge, from its file where it is there already."""
        params = {**BASE, **params}
        key = "-".join([name, *(f"{k}={v}" for k, v in sorted(params.items()))]).replace("/", "_")
        file, facts_file = self.work / f"{key}.safetensors", self.work / f"{key}.json"
        heads = self.model.config.num_key_value_heads
        layers = self.model.config.num_hidden_layers
        if facts_file.exists():
            flat = load_file(file)["prompt_embeddings"].to(self.model.device)
            prefix = KVPrefix.from_prompt_embeddings(flat, num_layers=layers, num_heads=heads)
            return prefix, json.loads(facts_file.read_text())
        tokens = len(self.codec.encode_context(text))
        num_tokens = params.get("num_tokens") or max(2, tokens // params["shrink"])
        conversations, synthesis_seconds = self._conversations(name, text, params)
        start = time.perf_counter()
        start_from = params.get("start", "auto")
        steps = max(1, round(self.args.steps * params.get("share", 1.0)))
        config = SelfStudyConfig(
            output_dir=str(self.work / "trainer"), max_steps=steps, save_strategy="no", logging_steps=5, plot=False,
            use_cpu=self.args.device == "cpu", disable_tqdm=True, report_to="none",
            loss_type=params.get("loss_type", "forward_kl"),
            initialization="first_tokens" if start_from == "unrelated_text" else start_from,
        )  # fmt: skip
        trainer = SelfStudyTrainer(
            self.model, config, conversations, processing_class=self.tokenizer, corpus=text,
            peft_config=CartridgeConfig(num_tokens=num_tokens, num_frozen_tokens=params.get("frozen", 1)),
        )  # fmt: skip
        if start_from == "unrelated_text":
            other = next(d.text for other, d in self.documents.items() if other != name)
            initialize_cartridge(trainer.model, self.codec, text=other, strategy="first_tokens")
        trainer.train()
        seconds = time.perf_counter() - start  # with the initialization
        prefix = trainer.model.get_kv_prefix().detach().to(self.model.dtype)
        losses = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
        self.model = trainer.model.unload().eval()
        facts = {
            "num_tokens": num_tokens, "text_tokens": tokens, "steps": steps, "conversations": len(conversations),
            "synthesis_seconds": round(synthesis_seconds, 1), "train_seconds": round(seconds, 1), "losses": losses,
        }  # fmt: skip
        save_file({"prompt_embeddings": prefix.to_prompt_embeddings().cpu()}, file)
        facts_file.write_text(json.dumps(facts))
        return prefix, facts

    def _conversations(self, name: str, text: str, params: dict[str, Any]) -> tuple[Any, float]:
        seeds = {1: ["question"], 5: None}[params.get("seeds", 5)]
        share = params["recitation_share"]
        options = {"seed_types": seeds} if seeds else {}
        config = SynthesisConfig(num_conversations=self.args.conversations, recitation_share=share, **options)
        folder = self.work / "conversations" / f"{name}-{share}-{params.get('seeds', 5)}"
        spent = folder / "seconds.json"
        start = time.perf_counter()
        dataset = SelfStudySynthesizer(self.model, self.tokenizer, config).synthesize(text, output_dir=folder)
        if not spent.exists():
            spent.write_text(json.dumps(time.perf_counter() - start))
        return dataset, json.loads(spent.read_text())


def result_from_dict(row: dict[str, Any]) -> SystemResult:
    """Of a line that a stopped cell has kept."""
    fields = {key: value for key, value in row.items() if key != "system"}
    items = {name: Items(**value) for name, value in row["items"].items()}
    return SystemResult(**{**fields, "name": row["system"], "items": items})


def _rounded(value: Any) -> Any:
    """Five decimals are enough for a line that is kept."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 5) if isinstance(value, float) and abs(value) < 1e6 else value


def load_documents(args: argparse.Namespace) -> tuple[dict[str, Document], list[str], list[dict[str, str]]]:
    """The documents, the names of those longer than the window, and the general pairs; a task that cannot be loaded is
    said and left out."""
    found: dict[str, Document] = {}
    for name in OWN:
        rows = ROOT / "examples/data" / f"{name}.questions.jsonl"
        questions = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        text = (ROOT / "examples/data" / f"{name}.md").read_text(encoding="utf-8")
        row = {"id": name, "text": text, "questions": questions}
        found[name] = document_from_row(row)
    long: list[str] = []
    for task in [*args.tasks, "loogle_short"]:
        try:
            documents = load_task(task, _local(args.data, task.split("_")[0]), min_questions=6)
        except (OSError, ValueError) as error:
            print(f"{task}: left out, {error}", file=sys.stderr)
            continue
        is_long = task.startswith("loogle")
        count = args.long_documents if is_long else args.documents
        fitting = [d for d in documents if is_long or len(d.text) < 4 * (args.window - 1200)]
        for document in fitting[:count]:
            found[document.id] = document
            if is_long:
                long.append(document.id)
    try:
        general = general_pairs(_local(args.data, "general"))
    except OSError as error:
        print(f"general prompts: left out, {error}", file=sys.stderr)
        general = []
    return found, long, [pair for pair in general if len(pair["prompt"]) + len(pair["answer"]) < 1200]


def _local(folder: Path | None, name: str) -> Path | None:
    """The file of a task in `--data`, where there is one."""
    files = [folder / f"{name}{ending}" for ending in (".jsonl", ".json")] if folder else []
    return next((file for file in files if file.exists()), None)


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> record of the finished cells; a line that a kill cut short is left out."""
    records: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["name"]] = record
    return records


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget", choices=BUDGETS, default="small", help="small is meant for half an hour on two cores, full for six"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further cell after so many minutes")
    parser.add_argument("--only", nargs="*", default=[], metavar="GROUP", help="only these groups of cells")
    parser.add_argument(
        "--skip", nargs="*", default=[], metavar="BASELINE", help="baselines to leave out, e.g. summary"
    )
    parser.add_argument("--list", action="store_true", help="list the cells and stop")
    parser.add_argument("--page-only", action="store_true", help="write the page from the lines that are there")
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", nargs="*", default=["qasper", "quality"])
    parser.add_argument("--data", type=Path, help="folder with the tasks' rows, instead of the Hub")
    parser.add_argument("--documents", type=int, default=3, help="of each task")
    parser.add_argument("--long-documents", type=int, default=2, help="of LooGLE")
    parser.add_argument("--window", type=int, default=8192, help="of the model; longer texts of the tasks are left out")
    parser.add_argument("--questions", type=int, default=24, help="of each document at most; 0 takes all")
    parser.add_argument("--general-prompts", type=int, default=24, help="that have nothing to do with the text")
    parser.add_argument("--conversations", type=int, default=384)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--encoder", help="SentenceTransformer of the dense retriever")
    parser.add_argument("--kvpress-python", help="interpreter of an environment with kvpress")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/results.jsonl", help="the JSON lines")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs/results", help="conversations and cartridges")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results.md")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    documents, long, general = load_documents(args)
    cells = plan([name for name in documents if name not in long], long)
    if args.page_only:
        page = write_page(list(read_records(args.output).values()), args.page, cells=[cell.name for cell in cells])
        print(f"Written: {page}")
        return
    wanted = [
        c
        for c in cells
        if BUDGETS.index(c.budget) <= BUDGETS.index(args.budget) and c.group in (args.only or [c.group])
    ]
    if args.list:
        for cell in cells:
            print(f"{cell.budget:7} {cell.name}")
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    run, start = Run(args, documents, general), time.perf_counter()
    # Where things lie on this machine is no part of what was run.
    given = [Path(word).name if Path(word).is_absolute() else word for word in argv or sys.argv[1:]]
    command = shlex.join(["python", "-m", "benchmarks.results", *given])
    try:
        for cell in wanted:
            if cell.name in read_records(args.output):
                continue
            if (time.perf_counter() - start) / 60 > args.minutes:
                print(f"{cell.name}: left for another time (--minutes)")
                continue
            print(f"{cell.name} …", file=sys.stderr, flush=True)
            record = run.carry_out(cell)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, "command": command, "planned": len(cells)}) + "\n")
            print(f"{cell.name}: {record['seconds']:.0f} s", flush=True)
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished cells are kept in {args.output}; the same command carries on")
    print(f"Written: {write_page(list(read_records(args.output).values()), args.page, cells=[c.name for c in cells])}")


if __name__ == "__main__":
    main()
