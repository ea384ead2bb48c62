"""What is measured: budgets, documents, and the cells of each budget, cheapest evidence first."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft_cartridges.evaluation import Document, load_task
from peft_cartridges.evaluation.documents import document_from_row
from peft_cartridges.evaluation.tasks import general_pairs
from peft_cartridges.initialization import list_strategies

ROOT = Path(__file__).parents[2]
OWN = ("lighthouse_handbook", "orchard_cooperative")
# Of every trained cell that does not say otherwise.
BASE: dict[str, Any] = {"shrink": 10, "recitation_share": 0.5}


@dataclass(frozen=True)
class Budget:
    """How much is computed. Two results are compared only where all of this is the same.

    Args:
        conversations, answer_tokens: Of a self-study, and the longest answer in tokens.
        steps, batch_size: Of a training.
        questions, general_prompts: Of each document at most; 0 takes all.
        new_tokens: Length of generated answers.
    """

    conversations: int
    answer_tokens: int
    steps: int
    batch_size: int
    questions: int
    general_prompts: int
    new_tokens: int

    def changed(self, **given: int | None) -> Budget:
        """With what is given and not `None`."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


BUDGETS = {
    # Half an hour on two cores, six hours on two cores: of SmolLM2-135M.
    "small": Budget(64, 64, 16, 8, 20, 12, 20),
    "full": Budget(256, 96, 40, 16, 24, 24, 32),
}
# Documents of each task, and long ones of LooGLE.
DOCUMENTS = {"small": (1, 1), "full": (3, 2)}


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Args:
        group: What it is compared with; a section of the page.
        kind: Which method of `Run` carries it out.
        document: On which.
        params: What makes it another than the base.
    """

    group: str
    kind: str
    document: str
    params: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        settings = ",".join(f"{key}={value}" for key, value in self.params)
        return f"{self.group}/{self.document}" + (f"/{settings}" if settings else "")


def plan(documents: list[str], long: list[str], budget: str) -> list[Cell]:
    """The cells of a budget.

    Args:
        documents: That fit the model's window.
        long: That do not.
        budget: `small` compares variants on the first document only, `full` on as many as six hours allow.
    """
    small = budget == "small"

    def cells(group: str, kind: str, on: list[str], **params: Any) -> list[Cell]:
        return [Cell(group, kind, document, tuple(sorted(params.items()))) for document in on]

    first, few = documents[:1], documents[:1] if small else documents[:4]
    real = [name for name in documents[1:] if name not in OWN]
    measured = [*first, *real[:1]] if small else documents
    found = cells("quality", "trained", first) + cells("cost", "cost", first) + cells("baselines", "baselines", first)
    found += [cell for shrink in (5, 20, 38) for cell in cells("sizes", "trained", first, shrink=shrink)]
    found += cells("quality", "trained", measured[1:]) + cells("lora", "lora", few)
    found += cells("objective", "trained", few, loss_type="cross_entropy") + cells("sink", "trained", few, frozen=0)
    starts = [name for name in list_strategies() if name not in ("auto", "attention_matching", "pretrained", "summary")]
    for start in [name for name in starts if name != "random_tokens"] if small else starts:
        found += cells("initializations", "trained", few, start=start)
    found += cells("initializations", "trained", few, start="unrelated_text")
    found += cells("baselines", "baselines", measured[1:])
    found += [cell for share in (0.5, 0.25) for cell in cells("seconds", "trained", first, share=share)]
    others = [name for name in documents if name not in first][:2]
    if others:
        found += cells("composition", "composition", first, others="+".join(others))
    found += [cell for seeds in (5, 1) for cell in cells("seeds", "trained", few, seeds=seeds, recitation_share=0.0)]
    found += cells("parts", "parts", few, parts=2) + cells("long", "beyond_window", long)
    found += cells("presses", "presses", first)
    if not small:
        found += [cell for shrink in (5, 20, 38) for cell in cells("sizes", "trained", documents[1:], shrink=shrink)]
        found += cells("seconds", "trained", first, share=2.0) + cells("sink", "trained", few, frozen=4)
        found += cells("presses", "presses", documents[1:]) + cells("lora", "lora", documents[4:])
        found += cells("objective", "trained", documents[4:], loss_type="cross_entropy")
        for one, two in zip(documents[1::2], documents[2::2], strict=False):
            found += cells("composition", "composition", [one], others=two)
    return found


def load_documents(
    tasks: list[str], data: Path | None, window: int, counts: tuple[int, int]
) -> tuple[dict[str, Document], list[str], list[dict[str, str]]]:
    """The documents, shortest first of each task; the names of those longer than the window; and the general pairs. A
    task that cannot be loaded is said and left out."""
    found: dict[str, Document] = {}
    for name in OWN:
        rows = ROOT / "examples/data" / f"{name}.questions.jsonl"
        questions = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        text = (ROOT / "examples/data" / f"{name}.md").read_text(encoding="utf-8")
        found[name] = document_from_row({"id": name, "text": text, "questions": questions})
    long: list[str] = []
    for task in [*tasks, "loogle_short"]:
        try:
            documents = load_task(task, local_file(data, task.split("_")[0]), min_questions=6)
        except (OSError, ValueError) as error:
            print(f"{task}: left out, {error}", file=sys.stderr)
            continue
        is_long = task.startswith("loogle")
        fitting = [d for d in documents if is_long or len(d.text) < 4 * (window - 1200)]
        for document in sorted(fitting, key=lambda d: len(d.text))[: counts[is_long]]:
            found[document.id] = document
            if is_long:
                long.append(document.id)
    try:
        general = general_pairs(local_file(data, "general"))
    except OSError as error:
        print(f"general prompts: left out, {error}", file=sys.stderr)
        general = []
    return found, long, [pair for pair in general if len(pair["prompt"]) + len(pair["answer"]) < 1200]


def local_file(folder: Path | None, name: str) -> Path | None:
    """The file of a task in a folder, where there is one."""
    files = [folder / f"{name}{ending}" for ending in (".jsonl", ".json")] if folder else []
    return next((file for file in files if file.exists()), None)


def settings_of(budget: Budget, model: str, dtype: str) -> dict[str, Any]:
    """What decides a cell's figures beside the code: kept in its line, and a line with others is measured anew."""
    return {**asdict(budget), "model": Path(model).name, "dtype": dtype}


def work_folder(work: Path, settings: dict[str, Any]) -> Path:
    """Where the conversations and cartridges of these settings lie."""
    return work / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
