"""Carries out cells: trains, measures, and keeps what is finished."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.harness import git_commit
from peft_cartridges import (
    CartridgeConfig,
    KVPrefix,
    SelfStudyConfig,
    SelfStudySynthesizer,
    SelfStudyTrainer,
    SynthesisConfig,
    initialize_cartridge,
)
from peft_cartridges.atomic_files import write_text
from peft_cartridges.chat import ChatCodec
from peft_cartridges.evaluation import (
    Bench,
    Document,
    EvaluationConfig,
    Making,
    ModelShape,
    System,
    Traffic,
    compare_costs,
    list_baselines,
    measure_machine,
)
from peft_cartridges.evaluation.cost import question_cost
from peft_cartridges.evaluation.evaluate import measure_systems, prepare_measuring
from peft_cartridges.evaluation.instructions import make_instructions
from peft_cartridges.evaluation.measurements import Measuring
from peft_cartridges.evaluation.report import SystemResult
from peft_cartridges.evaluation.speed import cpu_clock, measure_speed, wall_clock
from peft_cartridges.evaluation.system import bare_system, prefix_system
from peft_cartridges.evaluation.tasks import unanswerable_from
from peft_cartridges.self_study.making_cost import making_phases

from .plan import BASE, Budget, Cell, settings_of, work_folder
from .records import read_records, result_from_dict, rounded

# A cartridge of a text beyond the window, and what is left of the window for a question behind what fits.
_LONG_TOKENS, _LEFT = 768, 512
# Of what was kept without its commit.
_UNKNOWN = "unknown"


class Run:
    """What the cells share: the model, the documents, and what is trained and written already.

    Args:
        args: Of the command line.
        budget: How much is computed.
        documents: By name.
        general: Pairs that have nothing to do with them.
    """

    def __init__(
        self, args: argparse.Namespace, budget: Budget, documents: Mapping[str, Document], general: list[dict[str, str]]
    ) -> None:
        self.args, self.budget, self.documents, self.general = args, budget, documents, general
        self.tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        self.model = self.model.to(args.device).eval()
        self.codec = ChatCodec.of(self.model, self.tokenizer)
        self.settings = settings_of(budget, args.model, args.dtype)
        self.work: Path = work_folder(args.work, self.settings)
        for folder in ("partial", "references", "spent"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        self.commit = git_commit()
        self._measuring: dict[tuple[str, bool], Measuring] = {}
        # On a CPU, seconds are those of an idle one.
        self.clock = cpu_clock if args.device == "cpu" else wall_clock

    def carry_out(self, cell: Cell) -> dict[str, Any]:
        """The record of a cell: `seconds` also of what a stopped run of it has kept, `made_at` the other commits by which
        something of it was made."""
        name = cell.name.replace("/", "+")
        self._partial, self._spent = self.work / "partial" / f"{name}.jsonl", self.work / "spent" / f"{name}.json"
        earlier = json.loads(self._spent.read_text()) if self._spent.exists() else 0.0
        self._begin, self._made_at = self.clock() - earlier, {self.commit}
        figures = getattr(self, cell.kind)(cell.document, **dict(cell.params))
        seconds = self.clock() - self._begin
        for file in (self._partial, self._spent):
            file.unlink(missing_ok=True)
        return {
            "name": cell.name, "group": cell.group, "document": cell.document, "params": dict(cell.params),
            "settings": self.settings, "seconds": round(seconds, 1), "made_at": sorted(self._made_at - {self.commit}),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {self.args.device}",
            "clock": "cpu" if self.clock is cpu_clock else "wall", **figures,
        }  # fmt: skip

    # -- kinds of cells ----------------------------------------------------------------------------------------------

    def baselines(self, document: str) -> dict[str, Any]:
        """Everything that needs no training, at a tenth of the text."""
        left_out = {"lora", *self.args.skip}
        names = [name for name in list_baselines() if name not in left_out and not name.startswith("kvpress_")]
        return {"report": self._evaluate(self._bench(document), [], names)}

    def presses(self, document: str) -> dict[str, Any]:
        """kvpress, at a tenth of the text."""
        names = [name for name in list_baselines() if name.startswith("kvpress_")]
        return {"report": self._evaluate(self._bench(document), [], names)}

    def trained(self, document: str, **params: Any) -> dict[str, Any]:
        """A cartridge by self-study, measured with generated answers where it is the base."""
        prefix, facts = self._train(document, self.documents[document].text, **params)
        system = self._system("cartridge", prefix, seconds=facts["train_seconds"])
        return {"report": self._evaluate(self._bench(document), [system], [], generate=not params), **facts}

    def lora(self, document: str) -> dict[str, Any]:
        """LoRA of equal bytes, the same conversations and steps."""
        conversations, seconds, _ = self._conversations(document, self.documents[document].text, BASE)
        bench = self._bench(
            document, conversations=conversations, steps=self.budget.steps, batch_size=self.budget.batch_size
        )
        return {"report": self._evaluate(bench, [], ["lora"], generate=True), "synthesis_seconds": seconds}

    def composition(self, document: str, others: str) -> dict[str, Any]:
        """Cartridges that were trained apart, one behind the other, by depth and order, on the first one's questions."""
        mine, _ = self._train(document, self.documents[document].text)
        theirs = [self._train(other, self.documents[other].text)[0] for other in others.split("+")]
        orders = {"alone": [mine], "another alone": theirs[:1]}
        for depth in range(1, len(theirs) + 1):
            count = ("two", "three", "four")[depth - 1]
            orders |= {f"first of {count}": [mine, *theirs[:depth]], f"last of {count}": [*theirs[:depth], mine]}
        systems = [self._system(name, _joined(prefixes)) for name, prefixes in orders.items()]
        return {"report": self._evaluate(self._bench(document), systems, [])}

    def parts(self, document: str, parts: int) -> dict[str, Any]:
        """One text in parts, a cartridge each: together as long as the cartridge of the whole, and trained as long."""
        text = self.documents[document].text
        cut = [text.rfind(" ", 0, len(text) * i // parts + 1) for i in range(1, parts)]
        pieces = [text[a:b] for a, b in zip([0, *cut], [*cut, len(text)], strict=True)]
        prefixes = [
            self._train(f"{document}-part{i}", piece, share=1 / parts, asked=1 / parts)[0]
            for i, piece in enumerate(pieces)
        ]
        return {
            "report": self._evaluate(self._bench(document), [self._system(f"{parts} parts", _joined(prefixes))], [])
        }

    def beyond_window(self, document: str) -> dict[str, Any]:
        """A text beyond the window: against as much of it as fits, and retrieval of as many tokens."""
        prefix, facts = self._train(document, self.documents[document].text, num_tokens=_LONG_TOKENS)
        bench = self._bench(document, num_tokens=_LONG_TOKENS)
        fits = KVPrefix.from_input_ids(self.model, bench.text_ids[: (bench.window or 8192) - _LEFT])
        systems = [self._system("what fits", fits), self._system("cartridge", prefix, seconds=facts["train_seconds"])]
        return {"report": self._evaluate(bench, systems, ["bm25", "first_tokens"]), **facts}

    def cost(self, document: str) -> dict[str, Any]:
        """The cost model with this machine's measured speed, and its figures beside measured ones: of a self-study a
        quarter as long as the base's, and of answering one question."""
        text, quarter = self.documents[document].text, {"share": 0.25, "asked": 0.25}
        _, facts = self._train(f"{document}-cost", text, **quarter)
        rows, seconds, _ = self._conversations(f"{document}-cost", text, {**BASE, **quarter})
        bench = self._bench(document)
        size = next(self.model.parameters()).element_size()
        shape, machine = (
            ModelShape.of(self.model.config, dtype_bytes=size),
            measure_machine(self.model, clock=self.clock),
        )
        learned = [sum(mask) for mask in rows["completion_mask"]]
        lengths = [len(ids) for ids in rows["input_ids"]]
        about = zip(rows["chunk_id"], rows["context"], strict=True)  # general conversations are about none
        chunks = {chunk: len(self.codec.encode_context(text)) for chunk, text in about if text}
        making = Making(
            conversations=len(rows), question_tokens=statistics.mean(lengths) - statistics.mean(learned),
            answer_tokens=statistics.mean(learned), generated_share=1 - BASE["recitation_share"],
            chunk_tokens=statistics.mean(chunks.values()), conversations_per_chunk=math.ceil(len(rows) / len(chunks)),
            epochs=facts["steps"] * self.budget.batch_size / len(rows),
            batch_size=max(1, round(len(rows) * (1 - BASE["recitation_share"]) / len(chunks))),
        )  # fmt: skip
        phases = making_phases(shape, machine, making, bench.num_tokens)
        written = sum((phases[name].seconds for name in ("prefill", "writing", "scoring")), 0.0)
        checks = [
            ["writing conversations", written, seconds],
            ["training", phases["training"].seconds, facts["train_seconds"]],
        ]
        question = self.documents[document].answerable[0].question
        asked = len(self.codec.encode_prompt([question]))
        traffic = Traffic(question_tokens=asked, answer_tokens=16, batch_size=1)
        fronts = {"cartridge": bench.num_tokens, "text in context": len(bench.text_ids)}
        prefixes = {}
        for name, front in fronts.items():
            start = self.clock()
            prefixes[name] = KVPrefix.from_input_ids(self.model, bench.text_ids[:front])
            read = self.clock() - start
            speed = measure_speed(
                self._system(name, prefixes[name]), question, batch_size=1, new_tokens=16, repeats=2, clock=self.clock
            )
            told = question_cost(shape, machine, traffic, front=front).seconds
            checks.append(
                [f"a question, {name} in memory", told, speed.first_token_seconds + 16 / speed.tokens_per_second]
            )
        checks.append(
            ["reading the text", machine.seconds(shape.forward_flops(len(bench.text_ids), predicted=0)), read]
        )
        speed = measure_speed(
            bare_system(self.model, self.codec), question, batch_size=1, new_tokens=16, repeats=2, clock=self.clock
        )
        told = question_cost(shape, machine, traffic, front=0).seconds
        checks.append(
            ["a question, nothing in context", told, speed.first_token_seconds + 16 / speed.tokens_per_second]
        )
        held = [
            [f"{name}, bytes", shape.kv_bytes(prefix.num_tokens), prefix.nbytes] for name, prefix in prefixes.items()
        ]
        whole = replace(
            making, conversations=self.budget.conversations,
            epochs=self.budget.steps * self.budget.batch_size / self.budget.conversations,
        )  # fmt: skip
        costs = {}
        for shrink in (5, 10, 20, 38):
            num_tokens = max(2, len(bench.text_ids) // shrink)
            found = compare_costs(
                shape, machine, text_tokens=len(bench.text_ids), num_tokens=num_tokens, making=whole,
                traffic=Traffic(batch_size=8, passage_tokens=num_tokens),
            )  # fmt: skip
            costs[str(shrink)] = [asdict(cost) for cost in found]
        return rounded({
            "machine_measured": asdict(machine) | {"memory": None}, "text_tokens": len(bench.text_ids),
            "making": asdict(whole), "costs": costs, "seconds_told_and_measured": checks, "bytes_told_and_measured": held,
        })  # fmt: skip

    # -- what they share ---------------------------------------------------------------------------------------------

    def _keep_seconds(self) -> None:
        """Called where something has been kept, which the same cell does not make again after a stop."""
        write_text(self._spent, json.dumps(self.clock() - self._begin))

    def _system(self, name: str, prefix: KVPrefix, **facts: Any) -> System:
        return prefix_system(name, self.model, self.codec, prefix, **facts)

    def _bench(self, document: str, *, num_tokens: int | None = None, **options: Any) -> Bench:
        others = [name for name in self.documents if name != document]
        text = self.documents[document].text
        tokens = num_tokens or max(2, len(self.codec.encode_context(text)) // BASE["shrink"])
        return Bench(
            self.model, self.tokenizer, text, tokens,
            unrelated_text=self.documents[others[0]].text if others else "", kvpress_python=self.args.kvpress_python,
            encoder=self.args.encoder, **options,
        )  # fmt: skip

    def _evaluate(
        self, bench: Bench, systems: Sequence[System], baselines: Sequence[str], *, generate: bool = False
    ) -> dict[str, Any]:
        """A report. The references of a document are measured once, and kept beside the work."""
        document = next(name for name, given in self.documents.items() if given.text == bench.text)
        measuring = self._measuring.get((document, generate)) or self._prepare(document, bench, generate)
        self._measuring[document, generate] = measuring
        references = self.work / "references" / f"{document}-{'all' if generate else 'likelihoods'}.jsonl"
        # What a stop within a cell leaves is carried on from too.
        rows = {name: row for file in (references, self._partial) for name, row in read_records(file).items()}
        self._made_at |= {row.pop("commit", _UNKNOWN) for row in rows.values()}
        kept = {name: result_from_dict({**row, "name": name}) for name, row in rows.items()}

        def keep(name: str, result: SystemResult) -> None:
            file = references if name in ("no_context", "full_text") else self._partial
            with file.open("a", encoding="utf-8") as lines:
                row = {**asdict(result), "system": result.name, "name": name, "commit": self.commit}
                lines.write(json.dumps(row) + "\n")
            self._keep_seconds()

        report = measure_systems(
            measuring, systems, bench, baselines=baselines, kept=kept, finished=keep,
            progress=lambda name: print(f"    {name}", file=sys.stderr, flush=True),
        )  # fmt: skip
        return rounded(report.to_dict())

    def _prepare(self, document: str, bench: Bench, generate: bool) -> Measuring:
        given, budget = self.documents[document], self.budget
        config = EvaluationConfig(
            max_questions=budget.questions, max_general_prompts=budget.general_prompts, generate=generate,
            max_new_tokens=budget.new_tokens, speed=generate, abstention=generate,
        )  # fmt: skip
        prompts = [pair["prompt"] for pair in self.general[: budget.general_prompts or None]]
        unknown = unanswerable_from(list(self.documents.values()), given)
        measuring = prepare_measuring(
            bench, questions=given.answerable, general=self.general, args=config,
            instructions=make_instructions(prompts) if generate else (),
            unanswerable=unknown[: budget.questions or None] if generate else (),
        )  # fmt: skip
        measuring.clock = self.clock
        return measuring

    def _train(self, name: str, text: str, **params: Any) -> tuple[KVPrefix, dict[str, Any]]:
        """A trained cartridge, from its file where it is there already."""
        params = {**BASE, **params}
        key = "-".join([name, *(f"{k}={v}" for k, v in sorted(params.items()))]).replace("/", "_")
        file, facts_file = self.work / f"{key}.safetensors", self.work / f"{key}.json"
        if facts_file.exists():
            flat = load_file(file)["prompt_embeddings"].to(self.model.device)
            config = self.model.config
            prefix = KVPrefix.from_prompt_embeddings(
                flat, num_layers=config.num_hidden_layers, num_heads=config.num_key_value_heads
            )
            facts = json.loads(facts_file.read_text())
            self._made_at |= set(facts.pop("made_at", [_UNKNOWN]))
            return prefix, facts
        tokens = len(self.codec.encode_context(text))
        num_tokens = params.get("num_tokens") or max(2, tokens // params["shrink"])
        conversations, synthesis_seconds, written_at = self._conversations(name, text, params)
        start = self.clock()
        begin = params.get("start", "auto")
        steps = max(1, round(self.budget.steps * params.get("share", 1.0)))
        config = SelfStudyConfig(
            output_dir=str(self.work / "trainer"), max_steps=steps, save_strategy="no", logging_steps=5, plot=False,
            use_cpu=self.args.device == "cpu", disable_tqdm=True, report_to="none", warmup_steps=min(10, steps // 4),
            per_device_train_batch_size=self.budget.batch_size, loss_type=params.get("loss_type", "forward_kl"),
            initialization="first_tokens" if begin == "unrelated_text" else begin,
        )  # fmt: skip
        trainer = SelfStudyTrainer(
            self.model, config, conversations, processing_class=self.tokenizer, corpus=text,
            peft_config=CartridgeConfig(num_tokens=num_tokens, num_frozen_tokens=params.get("frozen", 1)),
        )  # fmt: skip
        if begin == "unrelated_text":
            other = next(d.text for d in self.documents.values() if d.text != text)
            initialize_cartridge(trainer.model, self.codec, text=other, strategy="first_tokens")
        begin_of_training = _Begin(self.clock)
        trainer.add_callback(begin_of_training)
        trainer.train()
        end = self.clock()
        prefix = trainer.model.get_kv_prefix().detach().to(self.model.dtype)
        losses = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
        self.model = trainer.model.unload().eval()
        facts = {
            "num_tokens": num_tokens, "text_tokens": tokens, "steps": steps, "conversations": len(conversations),
            "synthesis_seconds": round(synthesis_seconds, 3),
            "start_seconds": round(begin_of_training.at - start, 3),
            "train_seconds": round(end - begin_of_training.at, 3), "losses": losses,
        }  # fmt: skip
        save_file({"prompt_embeddings": prefix.to_prompt_embeddings().cpu()}, file)
        # Conversations of an older commit make a cartridge of both.
        write_text(facts_file, json.dumps({**facts, "made_at": sorted({written_at, self.commit})}))
        self._keep_seconds()
        return prefix, facts

    def _conversations(self, name: str, text: str, params: Mapping[str, Any]) -> tuple[Any, float, str]:
        """The conversations about a text, the seconds that writing them took, and the commit that wrote them."""
        kinds, share = params.get("seeds", 5), params["recitation_share"]
        options: dict[str, Any] = {"seed_types": ["question"]} if kinds == 1 else {}
        count = round(self.budget.conversations * params.get("asked", 1.0))
        config = SynthesisConfig(
            num_conversations=count, recitation_share=share, max_answer_tokens=self.budget.answer_tokens, **options
        )
        folder = self.work / "conversations" / f"{name}-{share}-{kinds}"
        facts_file = folder / "written.json"
        if not facts_file.exists():  # of a run that was stopped, what it took so far is not known
            shutil.rmtree(folder, ignore_errors=True)
        start = self.clock()
        dataset = SelfStudySynthesizer(self.model, self.tokenizer, config).synthesize(text, output_dir=folder)
        if not facts_file.exists():
            write_text(facts_file, json.dumps({"seconds": self.clock() - start, "commit": self.commit}))
            self._keep_seconds()
        facts = json.loads(facts_file.read_text())
        self._made_at.add(facts["commit"])
        return dataset, facts["seconds"], facts["commit"]


class _Begin(TrainerCallback):
    """When training begins, behind what the cartridge starts from."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self.at = clock, math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at = self._clock()


def _joined(prefixes: Sequence[KVPrefix]) -> KVPrefix:
    """One behind the other; the attention sink of the first is the only one."""
    return KVPrefix.concatenate([prefixes[0], *(prefix[1:] for prefix in prefixes[1:])])
