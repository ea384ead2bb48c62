"""Which settings of self-study make the best cartridge: a small search on SmolLM2-135M, one JSON line a run.

    python benchmarks/recipe.py --list
    python benchmarks/recipe.py base cross_entropy --output outputs/recipe.jsonl
    python benchmarks/recipe.py --group sizes --max_minutes 120 --output outputs/recipe.jsonl
    python benchmarks/recipe.py --table --output outputs/recipe.jsonl

Each run trains a cartridge and measures it on questions that training never saw: the mean negative log-likelihood of
the gold answers, and the share that this closes of the gap between no context and the full text in context; and, so
that no setting helps there and harms elsewhere, the share of the gap in KL that it closes on free conversations of another
seed. All runs share `BASE`, and change what their name says. Runs that are in the output already are left out, so the same command
carries on; conversations are written once for all runs that train on the same ones. Runs marked `same_seconds` take as
many steps as fit into the training time of `base`, so that they are compared in the same compute.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cartridges import CartridgeConfig, SelfStudyConfig, SelfStudySynthesizer, SelfStudyTrainer, SynthesisConfig
from peft_cartridges.chat import ChatCodec
from peft_cartridges.evaluation import ContextGap, gold_answer_nll, measure_context_gap

ROOT = Path(__file__).parents[1]
CORPORA = ("lighthouse_handbook", "orchard_cooperative")
# What goes by lengths is said here, and nothing is mixed in, so that runs differ in what their name says alone.
BASE: dict[str, Any] = {"num_conversations": 384, "max_steps": 40, "learning_rate": 0.04, "off_context_share": 0.0}
HELD_OUT = 32  # conversations


@dataclass(frozen=True)
class Run:
    """A run of the search.

    Args:
        name: Names it.
        group: What it is compared with.
        changes: Settings of `SelfStudyConfig` that are not those of `BASE`.
        corpus: A text in `examples/data`.
        shrink: How many times shorter than the corpus the cartridge is.
        num_frozen_tokens: Of the cartridge.
        same_seconds: Whether it takes as many steps as fit into the training time of `base`.
    """

    name: str
    group: str
    changes: dict[str, Any] = field(default_factory=dict)
    corpus: str = CORPORA[0]
    shrink: int = 20  # where settings still make a difference: at 1/5 nearly all of them close the gap
    num_frozen_tokens: int = 1
    same_seconds: bool = False


def _runs() -> list[Run]:
    runs = [
        Run("base", "objective"),
        Run("cross_entropy", "objective", {"loss_type": "cross_entropy"}),
        Run("reverse_kl", "objective", {"loss_type": "reverse_kl"}),
        Run("jsd", "objective", {"loss_type": "jsd"}),
        Run("top_k_20", "objective", {"teacher_targets": "top_k"}),
        Run("questions_too", "objective", {"prompt_loss_weight": 0.2}, same_seconds=True),
        # Without recitation, which is no seed prompt, the seeds make all the difference.
        Run("five_seeds", "seeds", {"recitation_share": 0.0}),
        Run("one_seed", "seeds", {"recitation_share": 0.0, "seed_types": ["question"]}),
        Run("sink_0", "sink", num_frozen_tokens=0),
        Run("sink_4", "sink", num_frozen_tokens=4),
        Run("sink_0_fast", "sink", {"learning_rate": 0.12}, num_frozen_tokens=0),
        Run("sink_1_fast", "sink", {"learning_rate": 0.12}),
        Run("on_policy_quarter", "on_policy", {"on_policy_fraction": 0.25}),
        Run("on_policy_quarter_same_seconds", "on_policy", {"on_policy_fraction": 0.25}, same_seconds=True),
        Run("on_policy_half_same_seconds", "on_policy", {"on_policy_fraction": 0.5}, same_seconds=True),
        Run("ema", "optimizer", {"ema_decay": 0.95}),
        Run("constant", "optimizer", {"lr_scheduler_type": "constant_with_warmup"}),
        Run("constant_ema", "optimizer", {"lr_scheduler_type": "constant_with_warmup", "ema_decay": 0.95}),
        Run("values_slower", "optimizer", {"value_learning_rate": 0.01}),
        Run("keys_slower", "optimizer", {"key_learning_rate": 0.01}),
        Run("three_passes_of_a_third", "data", {"num_conversations": 128}),
        Run("first_tokens", "initialization", {"initialization": "first_tokens"}),
        Run("most_attended", "initialization", {"initialization": "most_attended"}),
        Run("first_tokens_1/5", "initialization", {"initialization": "first_tokens"}, shrink=5),
        Run("most_attended_1/5", "initialization", {"initialization": "most_attended"}, shrink=5),
    ]
    runs += [Run(f"lr_{rate:g}", "learning_rate", {"learning_rate": rate}) for rate in (0.01, 0.02, 0.08)]
    runs += [
        Run(f"recitation_{share:g}", "recitation", {"recitation_share": share}) for share in (0.25, 0.5, 0.75, 1.0)
    ]
    runs += [
        Run(f"{corpus.split('_')[0]}_1/{shrink}", "sizes", {"max_steps": 60, "recitation_share": 0.75}, corpus, shrink)
        for corpus in CORPORA
        for shrink in (5, 10, 20, 38)
    ]
    return runs


RUNS = {run.name: run for run in _runs()}


class Search:
    """Carries out runs and keeps what they gave.

    Args:
        model_path: The model's folder or name.
        output: The JSON lines.
        overrides: Settings of all runs, over `BASE` and the runs' own.
        dtype: The model's.
    """

    def __init__(self, model_path: str, output: Path, overrides: dict[str, Any], dtype: str = "bfloat16") -> None:
        self.output = output
        self.overrides = overrides
        self.dtype = dtype
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
        self._gaps: dict[str, ContextGap] = {}

    def done(self) -> dict[str, dict[str, Any]]:
        lines = self.output.read_text(encoding="utf-8").splitlines() if self.output.exists() else []
        return {record["name"]: record for record in map(json.loads, lines)}

    def carry_out(self, run: Run) -> dict[str, Any]:
        """Trains and measures one run, and adds its line to the output."""
        text = (ROOT / "examples/data" / f"{run.corpus}.md").read_text(encoding="utf-8")
        lines = (ROOT / "examples/data" / f"{run.corpus}.questions.jsonl").read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line) for line in lines]
        corpus_tokens = len(ChatCodec(None, self.tokenizer).encode_context(text))
        num_tokens = round(corpus_tokens / run.shrink)
        if run.corpus not in self._gaps:
            self._gaps[run.corpus] = measure_context_gap(self.model, self.tokenizer, questions, text)
        gap = self._gaps[run.corpus]
        settings = {**BASE, **run.changes, **self.overrides}
        conversations, synthesis_seconds = self._conversations(run.corpus, text, settings)
        if run.same_seconds:
            settings["max_steps"] = self._steps_in_the_time_of_base(run, settings, conversations, text, num_tokens)
        held_out = {
            "num_conversations": HELD_OUT,
            "recitation_share": 0.0,
            "off_context_share": 0.0,
            "synthesis_seed": 1,
        }
        held_out_conversations, _ = self._conversations(run.corpus, text, held_out)
        start = time.perf_counter()
        trainer = self._trainer(run, settings, conversations, text, num_tokens, held_out_conversations)
        trainer.initialize_cartridge()
        before = trainer.model.get_kv_prefix()
        trainer.train()
        train_seconds = time.perf_counter() - start  # with the initialization
        held_out_gap_closed = trainer.evaluate()["eval_conversation_gap_closed"]
        tokenizer = trainer.processing_class
        nll = gold_answer_nll(trainer.model, tokenizer, questions)
        trainer.model.base_model.set_kv_prefix(before)
        nll_start = gold_answer_nll(trainer.model, tokenizer, questions)
        self.model = trainer.model.unload()
        record = {
            "name": run.name, "group": run.group, "corpus": run.corpus, "corpus_tokens": corpus_tokens,
            "num_tokens": num_tokens, "num_frozen_tokens": run.num_frozen_tokens, "settings": settings,
            "conversations": len(conversations), "steps": trainer.state.global_step,
            "synthesis_seconds": round(synthesis_seconds, 1), "train_seconds": round(train_seconds, 1),
            "nll_no_context": gap.no_context, "nll_full_context": gap.full_context,
            "nll_start": nll_start, "nll": nll, "gap_closed": gap.closed(nll), "held_out_gap_closed": held_out_gap_closed,
            "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
            "dtype": self.dtype, "command": self._command(run), "threads": torch.get_num_threads(),
        }  # fmt: skip
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def _command(self, run: Run) -> str:
        overrides = [f"{name}={json.dumps(value)}" for name, value in self.overrides.items()]
        settings = ["--set", *overrides] if overrides else []
        return shlex.join(["python", "benchmarks/recipe.py", run.name, "--dtype", self.dtype, *settings])

    def _trainer(
        self,
        run: Run,
        settings: dict[str, Any],
        conversations: Dataset,
        text: str,
        num_tokens: int,
        held_out: Dataset | None = None,
    ) -> SelfStudyTrainer:
        args = SelfStudyConfig(
            output_dir=str(self.output.parent / "recipe"),
            **{
                "save_strategy": "no", "logging_steps": 5, "plot": False, "use_cpu": not torch.cuda.is_available(),
                **settings,
            },
        )  # fmt: skip
        return SelfStudyTrainer(
            self.model,
            args,
            conversations,
            eval_dataset=held_out,
            processing_class=self.tokenizer,
            peft_config=CartridgeConfig(num_tokens=num_tokens, num_frozen_tokens=run.num_frozen_tokens),
            corpus=text,
        )

    def _conversations(self, corpus: str, text: str, settings: dict[str, Any]) -> tuple[Dataset, float]:
        names = {f.name for f in fields(SynthesisConfig)}
        args = SynthesisConfig(**{name: value for name, value in settings.items() if name in names})
        changed = {name: settings[name] for name in sorted(names & settings.keys())}
        key = "-".join(str(part).replace("/", "_") for item in changed.items() for part in item)
        folder = self.output.parent / "recipe" / "conversations" / f"{corpus}-{key}"
        seconds = folder / "seconds.json"
        spent = json.loads(seconds.read_text()) if seconds.exists() else None
        start = time.perf_counter()
        dataset = SelfStudySynthesizer(self.model, self.tokenizer, args).synthesize(text, output_dir=folder)
        if spent is None:
            spent = time.perf_counter() - start
            seconds.write_text(json.dumps(spent))
        return dataset, spent

    def _steps_in_the_time_of_base(
        self, run: Run, settings: dict[str, Any], conversations: Dataset, text: str, num_tokens: int
    ) -> int:
        base = self.done().get("base")
        if base is None:
            sys.exit(f"`{run.name}` is measured against the training time of `base`: run that first.")
        trial = self._trainer(run, {**settings, "max_steps": 8}, conversations, text, num_tokens)
        start = time.perf_counter()
        trial.train()
        step_seconds = (time.perf_counter() - start) / 8
        self.model = trial.model.unload()
        return max(1, round(base["train_seconds"] / step_seconds))


def print_table(records: list[dict[str, Any]]) -> None:
    """Markdown, a row a run."""
    print("| run | corpus | tokens | changes | steps | synthesis + training | NLL | gap closed | on conversations |")
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for record in records:
        changes = {k: v for k, v in record["settings"].items() if BASE.get(k) != v}
        if record["num_frozen_tokens"] != 1:
            changes["num_frozen_tokens"] = record["num_frozen_tokens"]
        shown = ", ".join(f"`{name}={value}`" for name, value in changes.items())
        minutes = (record["synthesis_seconds"] + record["train_seconds"]) / 60
        print(
            f"| `{record['name']}` | {record['corpus']} | {record['num_tokens']} of {record['corpus_tokens']} | {shown} "
            f"| {record['steps']} | {minutes:.1f} min | {record['nll']:.3f} | {record['gap_closed']:.1%} "
            f"| {record['held_out_gap_closed']:.1%} |"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RUN", help="runs to carry out (default: those of --group)")
    parser.add_argument("--group", nargs="*", default=[], help="groups of runs to carry out")
    parser.add_argument("--list", action="store_true", help="list the runs and stop")
    parser.add_argument("--table", action="store_true", help="print the output as a table and stop")
    parser.add_argument("--output", type=Path, default=Path("outputs/recipe.jsonl"), help="the JSON lines")
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="the model's")
    parser.add_argument("--max_minutes", type=float, default=1e9, help="begin no further run after so many minutes")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="settings of all runs")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(RUNS)) + sorted(set(args.group) - {run.group for run in RUNS.values()}):
        parser.error(f"unknown: {', '.join(unknown)}; see --list")
    return args


def main() -> None:
    args = parse_args()
    if args.list:
        for run in RUNS.values():
            print(f"{run.group:14} {run.name:32} {run.corpus:20} 1/{run.shrink:<3} {json.dumps(run.changes)}")
        return
    if args.table:
        lines = args.output.read_text(encoding="utf-8").splitlines()
        print_table([json.loads(line) for line in lines])
        return
    overrides = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in args.set)}
    wanted = [run for run in RUNS.values() if run.name in args.names or run.group in args.group]
    search, start = Search(args.model, args.output, overrides, args.dtype), time.perf_counter()
    for run in wanted:
        if run.name in search.done():
            print(f"{run.name}: there already")
            continue
        if (time.perf_counter() - start) / 60 > args.max_minutes:
            print(f"{run.name}: left for another time (--max_minutes)")
            continue
        record = search.carry_out(run)
        print(
            f"{run.name}: {record['gap_closed']:.1%} of the gap closed (NLL {record['nll']:.3f}, "
            f"{record['held_out_gap_closed']:.1%} on conversations, "
            f"{record['nll_start']:.3f} before training) in {record['synthesis_seconds']:.0f} s of synthesis and "
            f"{record['train_seconds']:.0f} s of training",
            flush=True,
        )


if __name__ == "__main__":
    main()
