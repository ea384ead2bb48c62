"""How well a gate tells requests for a cartridge from others, by what it looks at; and what it spares them.

    python -m benchmarks.gate DATA --methods words --conversations 0 --output outputs/gate-words.jsonl
    python -m benchmarks.gate DATA --documents qasper-8 quality-0 toefl-1 --general-kl 48 --output outputs/gate.jsonl
    python -m benchmarks.gate --table --output outputs/gate.jsonl

DATA is a folder with `qasper.jsonl`, `quality.jsonl`, `toefl.jsonl`, `loogle.jsonl` (`id`, `text`, `questions`, which people
wrote) and `general.jsonl` (`prompt`, `answer`: Self-Instruct's seed tasks). Each document's gate is made from its text
alone (`states` also from questions that the model asked itself about it), and its threshold from the package's own general
requests; it is then asked the document's questions, the seed tasks, and questions on the other documents, of the same
collection and of others. A line of `--output` is a document; those that are there are left out.

Methods: `words`, the package's gate; `states-L`, the nearest neighbours of the base model's mean state behind layer L among
the text's sentences and its own questions, against those among general requests; `first_token_kl`, `entropy` and
`likelihood`, what a cartridge that nothing trained (`most_attended`, a tenth of the text) changes in the first token of
the answer, and in how likely the request itself is. With `--general-kl N` the KL from the bare model on N seed tasks'
answers of that cartridge with and without the gate, and of the full text.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import harness
from peft_cartridges import (
    CartridgeConfig,
    KVPrefix,
    SelfStudySynthesizer,
    SynthesisConfig,
    initialize_cartridge,
    shared_prefix,
)
from peft_cartridges.chat import ChatCodec
from peft_cartridges.corpus.sentences import split_sentences
from peft_cartridges.evaluation.scoring import compare_rows, predictions, row_of_answer
from peft_cartridges.evaluation.system import bare_system, prefix_system
from peft_cartridges.gate import GENERAL_REQUESTS, Gate
from peft_cartridges.hidden_states import pad_right

ROOT = Path(__file__).parents[1]
# Shares of the words were chosen on the first three; docs/gate.md says what was seen of the others.
CHOSEN_ON = ("qasper-8", "quality-0", "toefl-1")
DOCUMENTS = (*CHOSEN_ON, "qasper-14", "quality-4", "toefl-8")
OWN = ("lighthouse_handbook", "orchard_cooperative")  # of this repository
COLLECTIONS = ("qasper", "quality", "toefl", "loogle")
BEYOND_WINDOW = 30000  # characters of a longer text that questions are asked about


class Questions:
    """What the gates are asked.

    Args:
        folder: DATA.
    """

    def __init__(self, folder: Path) -> None:
        self.texts: dict[str, str] = {}
        self.asked: dict[str, list[str]] = {}
        for name in COLLECTIONS:
            for row in _rows(folder / f"{name}.jsonl"):
                self.texts[row["id"]] = row["text"]
                self.asked[row["id"]] = list(dict.fromkeys(pair["question"] for pair in row["questions"]))
        for name in OWN:
            self.texts[name] = (ROOT / "examples/data" / f"{name}.md").read_text(encoding="utf-8")
            rows = _rows(ROOT / "examples/data" / f"{name}.questions.jsonl")
            self.asked[name] = list(dict.fromkeys(row["question"] for row in rows))
        self.pairs = _rows(folder / "general.jsonl")

    def of(self, document: str, most: int) -> dict[str, list[str]]:
        """Kind -> questions; at most `most` of each kind but the document's own."""
        own = self.asked[document]
        same, others = [], []
        for name, questions in self.asked.items():
            if name != document:
                (same if _collection(name) == _collection(document) else others).extend(set(questions) - set(own))
        draw = random.Random(document)
        return {
            "own": own,
            "general": [pair["prompt"] for pair in self.pairs],
            "others": draw.sample(sorted(set(others)), min(most, len(set(others)))),
            "same collection": draw.sample(sorted(set(same)), min(most, len(set(same)))),
        }


class Scorer:
    """Scores of requests by every method; higher means that they are about the text.

    Args:
        args: Of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        self.model: Any = None
        if set(args.methods) - {"words"} or args.general_kl or args.conversations:
            self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
            self.codec = ChatCodec.of(self.model, self.tokenizer)
        self._seen: dict[str, tuple[Any, ...]] = {}  # by request: what the bare model makes of it

    def scores(
        self, text: str, own_questions: Sequence[str], prefix: KVPrefix | None, requests: Sequence[str]
    ) -> tuple[dict[str, list[float]], Gate]:
        gate = Gate.make(text, self.tokenizer, reject_general=self.args.reject_general)
        found = {"words": [gate.score(request) for request in requests]}
        asked = len(requests)
        if "states" in self.args.methods:
            near = [*_sample(split_sentences(text), self.args.sentences), *own_questions]
            read = self._bare([*near, *requests])
            for number, layer in enumerate(self.args.layers):
                states = torch.stack([one[0][number] for one in read])
                # All states of a model point one way: around the mean of the general requests, they do not.
                general = slice(len(near), len(near) + len(GENERAL_REQUESTS))
                states = torch.nn.functional.normalize(states - states[general].mean(0), dim=-1)
                to_text, to_general = (states[-asked:] @ side.T for side in (states[: len(near)], states[general]))
                to_general.fill_diagonal_(-1)  # the general requests stand first: none is its own neighbour
                closeness = [cosines.topk(3).values.mean(-1) for cosines in (to_text, to_general)]
                found[f"states-{layer}"] = (closeness[0] - closeness[1]).tolist()
        if "first_token" in self.args.methods and prefix is not None:
            rows: dict[str, list[float]] = {name: [] for name in ("first_token_kl", "entropy", "likelihood")}
            with shared_prefix(self.model, prefix):
                behind = self._read(requests)
            for (_, first, nll), (_, bare_first, bare_nll) in zip(behind, self._bare(requests), strict=True):
                rows["first_token_kl"].append(float((first.exp() * (first - bare_first)).sum()))
                rows["entropy"].append(float((first.exp() * first).sum() - (bare_first.exp() * bare_first).sum()))
                rows["likelihood"].append(bare_nll - nll)
            found |= rows
        return found, gate

    def _bare(self, requests: Sequence[str]) -> list[tuple[Any, ...]]:
        new = [request for request in dict.fromkeys(requests) if request not in self._seen]
        self._seen |= dict(zip(new, self._read(new), strict=True))
        return [self._seen[request] for request in requests]

    @torch.no_grad()
    def _read(self, requests: Sequence[str]) -> list[tuple[Any, ...]]:
        """Of each request: mean states of its tokens `[layers, hidden_size]`, log-probabilities of the first token of the
        answer `[vocab_size]`, and the mean negative log-likelihood of its own tokens."""
        rows = []
        for request in requests:
            ids = self.codec.encode_request([{"role": "user", "content": request}])
            if len(ids) > self.args.max_request_tokens:  # the end opens the answer
                ids = ids[: self.args.max_request_tokens - 5] + ids[-5:]
            rows.append(ids)
        found: list[tuple[Any, ...]] = [()] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        for start in range(0, len(order), 8):
            batch = order[start : start + 8]
            output = self.model(pad_right([rows[index] for index in batch]), output_hidden_states=True)
            for place, index in enumerate(batch):
                ids = torch.tensor(rows[index])
                logits = output.logits[place, : len(ids)].float().log_softmax(-1)
                body = slice(3, max(4, len(ids) - 5))
                states = [output.hidden_states[layer][place, body].float().mean(0) for layer in self.args.layers]
                nll = -logits[:-1].gather(-1, ids[1:, None])[body].mean()
                found[index] = (torch.stack(states), logits[-1].clone(), float(nll))
        return found


def measure(args: argparse.Namespace) -> None:
    """Adds a line to the output for each document that has none."""
    questions, scorer = Questions(args.data), Scorer(args)
    done = {record["document"] for record in _rows(args.output)} if args.output.exists() else set()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for document in args.documents:
        if document in done:
            continue
        start = time.perf_counter()
        text = questions.texts[document]
        own_questions = _self_study(args, scorer, document, text) if args.conversations else []
        prefix = None
        if scorer.model is not None and ("first_token" in args.methods or args.general_kl):
            prefix = _untrained(scorer, text)
        kinds = questions.of(document, args.most)
        started = time.process_time()
        requests = [*GENERAL_REQUESTS, *(one for asked in kinds.values() for one in asked)]
        found, gate = scorer.scores(text, own_questions, prefix, requests)
        record: dict[str, Any] = {
            "document": document, "words": len(gate.words), "questions_of_its_own": len(own_questions),
            "methods": {}, "processor_seconds": round(time.process_time() - started, 2),
        }  # fmt: skip
        for method, scores in found.items():
            record["methods"][method] = _rates(scores, kinds, args.reject_general)
        if args.general_kl and prefix is not None:
            record["general_kl"] = _general_kl(args, scorer, gate, prefix, text, questions.pairs)
        record["seconds"] = round(time.perf_counter() - start, 1)
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


def _rates(scores: Sequence[float], kinds: dict[str, list[str]], reject_general: float) -> dict[str, Any]:
    """Threshold by the package's general requests, as `Gate.make` sets it; the shares accepted; and, whatever the
    threshold, how often a question on the text scores higher than another request (AUC)."""
    start = len(GENERAL_REQUESTS)
    ordered = sorted(scores[:start])
    threshold = ordered[min(int(np.ceil(reject_general * start)), start - 1)]
    accepted, auc, own = {}, {}, np.array(scores[start : start + len(kinds["own"])])
    for kind, asked in kinds.items():
        of_kind = np.array(scores[start : start + len(asked)])
        start += len(asked)
        accepted[kind] = round(float((of_kind >= threshold).mean()), 4)
        if kind != "own":
            wins = (own[:, None] > of_kind).mean() + (own[:, None] == of_kind).mean() / 2
            auc[kind] = round(float(wins), 4)
    return {"threshold": threshold, "accepted": accepted, "auc": auc}


def _general_kl(
    args: argparse.Namespace, scorer: Scorer, gate: Gate, prefix: KVPrefix, text: str, pairs: Sequence[dict[str, str]]
) -> dict[str, float]:
    """Nats per token from the bare model: of the cartridge, of the cartridge behind its gate, of the full text."""
    model, codec = scorer.model, scorer.codec
    chosen = random.Random(0).sample(list(pairs), args.general_kl)
    rows = [row_of_answer(codec, pair["prompt"], pair["answer"]) for pair in chosen]
    states = predictions(bare_system(model, codec), rows, batch_size=8)
    accepted = gate([pair["prompt"] for pair in chosen])
    found: dict[str, float] = {"accepted": sum(accepted) / len(accepted)}
    for name, held in (("cartridge", prefix), ("full_text", KVPrefix.from_text(model, scorer.tokenizer, text))):
        measured = compare_rows(prefix_system(name, model, codec, held), rows, states, batch_size=8)
        tokens = sum(row.tokens for row in measured)
        found[name] = sum(row.kl for row in measured) / tokens
        if name == "cartridge":
            found["gated"] = sum(row.kl for row, use in zip(measured, accepted, strict=True) if use) / tokens
    return found


def _self_study(args: argparse.Namespace, scorer: Scorer, document: str, text: str) -> list[str]:
    """Questions that the model asks itself about the text; kept in `--work`, as they take minutes."""
    path = args.work / f"{document}.jsonl"
    if not path.exists():
        settings = SynthesisConfig(
            num_conversations=args.conversations, conversations_per_chunk=16, max_answer_tokens=24, teacher_targets="live",
            quality_filters=[
                "empty", "truncated_question", "refusal", "duplicate", "near_duplicate", "vague_question",
            ],
        )  # fmt: skip
        written = SelfStudySynthesizer(scorer.model, scorer.tokenizer, settings).synthesize(text[:BEYOND_WINDOW])
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"q": row["messages"][0]["content"], "type": row["seed_type"]} for row in written]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [row["q"] for row in _rows(path)]


def table(args: argparse.Namespace) -> None:
    """Means over documents, those that the method was chosen on apart from the others."""
    records = _rows(args.output)
    header = ["method", "documents", "n", "own accepted", "least", "general rejected", "least", "others rejected",
              "same collection rejected", "AUC general", "others", "same"]  # fmt: skip
    rows = []
    for title, chosen in (("chosen on", True), ("others", False)):
        group = [record for record in records if (record["document"] in CHOSEN_ON) == chosen]
        for method in dict.fromkeys(name for record in group for name in record["methods"]):
            found = [record["methods"][method] for record in group if method in record["methods"]]
            shares = {kind: [one["accepted"][kind] for one in found] for kind in found[0]["accepted"]}
            aucs = [statistics.mean(one["auc"][kind] for one in found) for kind in found[0]["auc"]]
            rows.append(
                [
                    method, title, len(found), f"{statistics.mean(shares['own']):.1%}", f"{min(shares['own']):.1%}",
                    f"{1 - statistics.mean(shares['general']):.1%}", f"{1 - max(shares['general']):.1%}",
                    f"{1 - statistics.mean(shares['others']):.1%}", f"{1 - statistics.mean(shares['same collection']):.1%}",
                    *(f"{auc:.3f}" for auc in aucs),
                ]
            )  # fmt: skip
    harness.print_table(header, rows)
    kl = [(record["document"], record["general_kl"]) for record in records if "general_kl" in record]
    if kl:
        print()
        names = ("cartridge", "gated", "full_text")
        rows = [
            [document, *(f"{one[name]:.3f}" for name in names), f"{one['gated'] / one['full_text']:.2f}"]
            for document, one in kl
        ]
        harness.print_table(
            ["document", "KL of the cartridge", "with the gate", "of the full text", "gate : full text"], rows
        )
    print(f"\n{statistics.mean(record['words'] for record in records):.0f} words a gate.")


def _untrained(scorer: Scorer, text: str) -> KVPrefix:
    """A tenth of the text's keys and values."""
    length = len(scorer.codec.encode_context(text)) // 10
    model = get_peft_model(scorer.model, CartridgeConfig(num_tokens=length))
    prefix = initialize_cartridge(model, scorer.codec, text=text, strategy="most_attended").detach()
    scorer.model = model.unload()
    return prefix


def _sample(lines: Sequence[str], most: int) -> list[str]:
    return list(lines) if len(lines) <= most else random.Random(0).sample(list(lines), most)


def _collection(document: str) -> str:
    return "own" if document in OWN else document.split("-")[0]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, metavar="DATA")
    parser.add_argument("--documents", nargs="+", default=list(DOCUMENTS), help="`all` takes all of them")
    parser.add_argument("--methods", nargs="+", default=["words", "states", "first_token"])
    parser.add_argument("--sentences", type=int, default=128, help="of the text, among which `states` looks")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20, 30], help="behind which `states` looks")
    parser.add_argument("--conversations", type=int, default=48, help="of self-study, for `states`; 0: the text alone")
    parser.add_argument("--general-kl", type=int, default=0, metavar="N", help="seed tasks to measure the KL on")
    parser.add_argument("--reject-general", type=float, default=0.85)
    parser.add_argument("--most", type=int, default=100, help="questions on other documents, of either kind")
    parser.add_argument("--max-request-tokens", type=int, default=160)
    parser.add_argument("--model", default=harness.DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("outputs/gate-questions"))
    parser.add_argument("--output", type=Path, default=Path("outputs/gate.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the table of what is in the output")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.data is None and not args.table:
        parser.error("DATA is missing")
    if not args.table:
        if args.documents == ["all"]:
            args.documents = list(Questions(args.data).texts)
        measure(args)
    table(args)


if __name__ == "__main__":
    main()
