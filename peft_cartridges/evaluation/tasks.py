"""Tasks: documents with questions, from the data sets of the Hub or from local files of the same form. A row each."""

from __future__ import annotations

import ast
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .documents import Document, Question, check_gold_answers, document_from_row, read_json_lines

Parser = Callable[[Iterable[Mapping[str, Any]]], Iterator[Document]]


@dataclass(frozen=True)
class Task:
    """Where a task's documents come from.

    Args:
        about: What it is, and what it measures.
        parse: Rows of the source to documents.
        dataset, config, split, revision: On the Hub; no `dataset` where it is not there.
        source: Where a local file of it comes from, for the error that asks for one.
    """

    about: str
    parse: Parser
    dataset: str | None = None
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    source: str = ""


def _answers(*given: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(text).strip() for text in given if text is not None and str(text).strip()))


def _grouped(pairs: Iterable[tuple[str, str, Question]]) -> Iterator[Document]:
    """(name, text, question) of each question to documents; questions on one text need not stand together."""
    texts: dict[str, tuple[str, list[Question]]] = {}
    for name, text, question in pairs:
        texts.setdefault(text, (name, []))[1].append(question)
    for text, (name, questions) in texts.items():
        yield Document(name, text, tuple(questions))


def _qasper(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    for row in rows:
        body = row["full_text"]
        sections = zip(body["section_name"], body["paragraphs"], strict=True)
        parts = [row.get("title"), row.get("abstract")]
        parts += ["\n".join(filter(None, [heading, *paragraphs])) for heading, paragraphs in sections]
        questions = []
        for question, given in zip(row["qas"]["question"], row["qas"]["answers"], strict=True):
            found: list[str] = []
            for answer in given["answer"]:
                yes_no = {True: "Yes", False: "No", None: ""}[answer["yes_no"]]
                found.append(answer["free_form_answer"] or ", ".join(answer["extractive_spans"]) or yes_no)
            questions.append(Question(question, _answers(*found)))
        yield Document(str(row["id"]), "\n\n".join(filter(None, parts)), tuple(questions))


def _quality(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    def pairs() -> Iterator[tuple[str, str, Question]]:
        for number, row in enumerate(rows):
            options, correct = tuple(row["options"]), int(row["answer"])
            yield f"quality-{number}", row["article"], Question(row["question"], (options[correct],), options, correct)

    return _grouped(pairs())


def _longhealth(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    patients = [p for row in rows for p in (row.items() if "texts" not in row else [(row.get("id", "patient"), row)])]
    for name, patient in patients:
        questions = []
        for asked in patient["questions"]:
            options = tuple(asked[f"answer_{letter}"] for letter in "abcde")
            questions.append(Question(asked["question"], (asked["correct"],), options, options.index(asked["correct"])))
        facts = [f"{key}: {patient[key]}" for key in ("name", "birthday", "diagnosis") if patient.get(key)]
        yield Document(str(name), "\n\n".join(["\n".join(facts), *patient["texts"].values()]), tuple(questions))


def _loogle(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    def pairs() -> Iterator[tuple[str, str, Question]]:
        for number, row in enumerate(rows):
            name = str(row.get("title") or row.get("id") or f"loogle-{number}")
            text = row.get("context") or row["input"]
            given = row.get("qa_pairs")
            if given in (None, "", "none"):
                request = row.get("question") or "Write a summary of the text above."
                yield name, text, Question(request, _answers(row.get("answer", row.get("output"))))
                continue
            for pair in ast.literal_eval(given) if isinstance(given, str) else given:
                yield name, text, Question(pair["Q"], _answers(pair["A"]))

    return _grouped(pairs())


def _financebench(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    pages: dict[str, list[str]] = {}
    asked: dict[str, list[Question]] = {}
    for row in rows:
        name = row["doc_name"]
        asked.setdefault(name, []).append(Question(row["question"], _answers(row["answer"])))
        pages.setdefault(name, []).extend(part["evidence_text_full_page"] for part in row["evidence"])
    for name, questions in asked.items():
        yield Document(name, "\n\n".join(dict.fromkeys(pages[name])), tuple(questions))


def _finqa(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    def pairs() -> Iterator[tuple[str, str, Question]]:
        for number, row in enumerate(rows):
            table = "\n".join(" | ".join(map(str, line)) for line in row["table"])
            text = "\n".join([*row["pre_text"], table, *row["post_text"]])
            answer = _answers(row.get("final_result"), row.get("answer"))
            yield str(row.get("id", f"finqa-{number}")), text, Question(row["question"], answer)

    return _grouped(pairs())


def _hotpotqa(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    for row in rows:
        context = row["context"]
        articles = zip(context["title"], context["sentences"], strict=True)
        text = "\n\n".join(f"{title}\n{''.join(sentences)}" for title, sentences in articles)
        yield Document(str(row["id"]), text, (Question(row["question"], _answers(row["answer"])),))


def _govreport(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    for number, row in enumerate(rows):
        request = Question("Write a summary of the report above.", _answers(row["summary"]))
        yield Document(f"report-{number}", row["report"], (request,))


def _mtob(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    for row in rows:
        questions = tuple(
            Question(f"Translate into English: {pair['original']}", _answers(pair["ground_truth"]))
            for pair in row["examples"]
        )
        yield Document("grammar book", row["text"], questions)


def _structure(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    for number, row in enumerate(rows):
        headings = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", row["text"], re.MULTILINE)
        if len(headings) > 1:
            request = Question("List the headings of the text above, in order, one a line.", ("\n".join(headings),))
            yield Document(str(row.get("id", f"text-{number}")), row["text"], (request,))


def _own_form(rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    return map(document_from_row, rows)


TASKS: dict[str, Task] = {
    "longhealth": Task(
        "20 patient records, 400 questions with five options (arXiv 2401.14490).",
        _longhealth,
        source="benchmark_v5.json of github.com/kbressem/LongHealth",
    ),
    "qasper": Task(
        "Papers, free answers, some unanswerable (arXiv 2105.03011).", _qasper, "allenai/qasper",
        revision="refs/convert/parquet",
    ),
    "quality": Task("Stories, four options (arXiv 2112.08608).", _quality, "emozilla/quality", split="validation"),
    "mtob": Task(
        "Translation from a grammar book (arXiv 2309.16575); the metric is chrF.",
        _mtob,
        source='github.com/lukemelas/mtob: one row {"text": its book, "examples": [{"original", "ground_truth"}]}',
    ),
    "loogle_short": Task("Articles, short answers (arXiv 2311.04939).", _loogle, "bigai-nlco/LooGLE", "shortdep_qa"),
    "loogle_long": Task("Articles, reasoning over all of it.", _loogle, "bigai-nlco/LooGLE", "longdep_qa"),
    "loogle_summary": Task("Papers, abstracts as summaries.", _loogle, "bigai-nlco/LooGLE", "summarization"),
    "govreport": Task("Reports, summaries (arXiv 2104.02112).", _govreport, "ccdv/govreport-summarization"),
    "financebench": Task(
        "Filings, for composition (arXiv 2311.11944).", _financebench, "PatronusAI/financebench", split="train"
    ),
    "finqa": Task("Pages of annual reports, arithmetic (arXiv 2109.00122).", _finqa, "ibm-research/finqa"),
    "hotpotqa": Task(
        "Ten articles, questions over two (arXiv 1809.09600).", _hotpotqa, "hotpotqa/hotpot_qa", "distractor",
        split="validation",
    ),
    "structure": Task(
        "The headings of a Markdown text, in order.", _structure, source='rows {"text": …} or Markdown files of your own'
    ),
    "documents": Task(
        "Texts of your own.", _own_form, source='rows {"text", "questions": [{"question", "answer"}]}'
    ),
}  # fmt: skip

# Prompts that have nothing to do with a text.
GENERAL: dict[str, tuple[str, str | None, str]] = {
    "self_instruct": ("HuggingFaceH4/self-instruct-seed", None, "train"),
    "mmlu": ("cais/mmlu", "all", "test"),
    "ifeval": ("google/IFEval", None, "train"),
}


def load_task(
    name: str, path: str | Path | None = None, *, max_documents: int | None = None, min_questions: int = 1
) -> list[Document]:
    """A task's documents.

    Args:
        name: A row of `TASKS`.
        path: A local file (JSON, JSON lines; Markdown for `structure`) instead of the Hub: in the form of the source, or
            in the form of `documents`.
        max_documents: Stop after so many.
        min_questions: Leave out documents with fewer answered questions.

    Raises:
        ValueError: the task is unknown, needs a file, the file has another form, or no question has an answer.
        OSError: the Hub cannot be reached, or there is no such file.
    """
    if name not in TASKS:
        raise ValueError(f"The task {name!r} is unknown; there are: {', '.join(TASKS)}.")
    task = TASKS[name]
    if path is None:
        if task.dataset is None:
            raise ValueError(f"The task {name!r} is not on the Hub: give a file ({task.source}).")
        rows: Iterable[Mapping[str, Any]] = load_rows(task.dataset, task.config, task.split, task.revision)
    elif Path(path).suffix.lower() in (".md", ".markdown"):
        rows = [{"id": Path(path).stem, "text": Path(path).read_text(encoding="utf-8")}]
    else:
        rows = read_json_lines(path)
    where = str(path or task.dataset)
    try:
        first = next(iter(rows), None)
        if first is None:
            raise ValueError(f"{where} has no rows.")
        parse = _own_form if path is not None and "questions" in first and "text" in first else task.parse
        found = (d for d in parse(rows) if len(d.answerable) >= min_questions)
        documents = list(itertools.islice(found, max_documents))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} has not the form of {name}: {type(error).__name__} {error}.") from error
    check_gold_answers(documents, where)
    return documents


def load_rows(dataset: str, config: str | None, split: str, revision: str | None = None) -> Any:
    """Rows of a data set of the Hub.

    Raises:
        OSError: it cannot be reached.
    """
    from datasets import load_dataset

    try:
        return load_dataset(dataset, config, split=split, revision=revision)
    except Exception as error:  # datasets raises errors of many kinds where the network is gone
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"The data set {dataset} could not be loaded ({reason}): give a local file of the same form."
        ) from error


def general_pairs(path: str | Path | None = None) -> list[dict[str, str]]:
    """General prompts with answers: self-instruct's seed tasks, or a file of `prompt` and `answer`."""
    if path is not None:
        return [{"prompt": row["prompt"], "answer": row["answer"]} for row in _with(path, "prompt", "answer")]
    rows = load_rows(*GENERAL["self_instruct"])
    pairs = []
    for row in rows:
        first = row["instances"][0]
        pairs.append(
            {"prompt": "\n".join(filter(None, [row["instruction"], first["input"]])), "answer": first["output"]}
        )
    return [pair for pair in pairs if pair["answer"].strip()]


def general_choices(path: str | Path | None = None) -> list[Question]:
    """General multiple choice: MMLU, or a file of its form (`question`, `choices`, `answer` as an index) or of ours."""
    rows = load_rows(*GENERAL["mmlu"]) if path is None else _with(path, "question")
    found = []
    for row in rows:
        options = tuple(row.get("choices") or row.get("options") or ())
        correct = row["correct"] if "correct" in row else int(row["answer"])
        found.append(Question(row["question"], (options[correct],), options, correct))
    return found


def instruction_rows(path: str | Path | None = None) -> list[dict[str, Any]]:
    """Instructions with rules: IFEval, or a file of its form (`prompt`, `instruction_id_list`, `kwargs`)."""
    rows = load_rows(*GENERAL["ifeval"]) if path is None else _with(path, "prompt", "instruction_id_list")
    return [dict(row) for row in rows]


def _with(path: str | Path, *fields: str) -> list[dict[str, Any]]:
    rows = read_json_lines(path)
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in fields if name not in row]:
            raise ValueError(f"{path}, row {number} lacks {', '.join(missing)}.")
    return rows


_SUBJECTS = [
    "harbor",
    "bakery",
    "archive",
    "orchard",
    "theater",
    "clinic",
    "garage",
    "library",
    "museum",
    "station",
    "vineyard",
    "workshop",
]
_FILLER = (
    "The road goes on past the fields, and nothing much happens there.",
    "In the evening people sit by the window and talk about the weather.",
    "A cart passes, then another, and the dust settles again.",
    "Some say that it used to be busier in the old days.",
    "Nobody remembers who planted the trees along the river.",
)


def make_needles(num_words: int, num_needles: int = 8, *, seed: int = 0) -> Document:
    """A multi-key needle of any length: numbers of several places, hidden among filler; each question asks for one.

    Raises:
        ValueError: there are more needles than places, or no room for them.
    """
    if not 0 < num_needles <= len(_SUBJECTS):
        raise ValueError(f"`num_needles` must be between 1 and {len(_SUBJECTS)}, got {num_needles}.")
    rng = random.Random(seed)
    keys = rng.sample(_SUBJECTS, num_needles)
    values = [str(rng.randrange(100_000, 1_000_000)) for _ in keys]
    needles = [f"The secret number of the {key} is {value}." for key, value in zip(keys, values, strict=True)]
    sentences, count = [], sum(len(needle.split()) for needle in needles)
    if num_words < count:
        raise ValueError(f"`num_words={num_words}` is too few for {num_needles} needles of {count} words.")
    while count < num_words:
        sentences.append(rng.choice(_FILLER))
        count += len(sentences[-1].split())
    for needle in needles:
        sentences.insert(rng.randrange(len(sentences) + 1), needle)
    questions = tuple(
        Question(f"What is the secret number of the {key}?", (value,)) for key, value in zip(keys, values, strict=True)
    )
    return Document(f"needles-{num_words}-{num_needles}-{seed}", " ".join(sentences), questions)


def join_documents(documents: Sequence[Document], name: str = "together") -> Document:
    """Several documents as one text with the questions on all: multi-document questions, and one corpus in parts."""
    text = "\n\n".join(document.text.strip() for document in documents)
    return Document(name, text, tuple(itertools.chain.from_iterable(d.questions for d in documents)))


def unanswerable_from(documents: Sequence[Document], but: Document) -> list[Question]:
    """Questions of the other documents, which `but` does not answer; their gold answers are left out."""
    return [
        Question(question.question) for document in documents if document is not but for question in document.questions
    ]
