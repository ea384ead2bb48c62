"""Every task's rows, in the form that its source has, become documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_cartridges.evaluation import TASKS, Question, load_task, make_needles
from peft_cartridges.evaluation.tasks import (
    general_choices,
    general_pairs,
    instruction_rows,
    join_documents,
    unanswerable_from,
)

_QASPER_ANSWER = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": ""}

# Task -> (one or more rows as its source has them, the text's beginning, questions)
ROWS: dict[str, tuple[list[dict[str, Any]], str, list[Question]]] = {
    "longhealth": (
        [{"patient_1": {"name": "Ann", "birthday": "1.1.", "diagnosis": "flu", "texts": {"t0": "Letter one.", "t1": "Two."},
          "questions": [{"question": "Which?", "answer_a": "cold", "answer_b": "flu", "answer_c": "c", "answer_d": "d",
                         "answer_e": "e", "correct": "flu"}]}}],
        "name: Ann\nbirthday: 1.1.\ndiagnosis: flu\n\nLetter one.\n\nTwo.",
        [Question("Which?", ("flu",), ("cold", "flu", "c", "d", "e"), 1)],
    ),
    "qasper": (
        [{"id": "1", "title": "T", "abstract": "A", "full_text": {"section_name": ["S", None], "paragraphs": [["p", "q"], ["r"]]},
          "qas": {"question": ["a?", "b?", "c?"], "answers": [
              {"answer": [{**_QASPER_ANSWER, "extractive_spans": ["x", "y"]}, {**_QASPER_ANSWER, "free_form_answer": "z"}]},
              {"answer": [{**_QASPER_ANSWER, "yes_no": False}]},
              {"answer": [{**_QASPER_ANSWER, "unanswerable": True}]}]}}],
        "T\n\nA\n\nS\np\nq\n\nr",
        [Question("a?", ("x, y", "z")), Question("b?", ("No",)), Question("c?")],
    ),
    "quality": (
        [{"article": "Story.", "question": "a?", "options": ["x", "y"], "answer": 1},
         {"article": "Story.", "question": "b?", "options": ["x", "y"], "answer": 0}],
        "Story.",
        [Question("a?", ("y",), ("x", "y"), 1), Question("b?", ("x",), ("x", "y"), 0)],
    ),
    "mtob": (
        [{"text": "Grammar.", "examples": [{"original": "kai", "ground_truth": "one"}]}], "Grammar.",
        [Question("Translate into English: kai", ("one",))],
    ),
    "loogle_short": (
        [{"input": "Article.", "title": "X", "qa_pairs": "[{'Q': 'a?', 'A': 'b', 'S': ['s']}]", "output": "none"}], "Article.",
        [Question("a?", ("b",))],
    ),
    "loogle_long": (
        [{"context": "Article.", "title": "X", "question": "a?", "answer": "b"}], "Article.", [Question("a?", ("b",))]
    ),
    "loogle_summary": (
        [{"input": "Paper.", "title": "X", "qa_pairs": "none", "output": "Abstract."}], "Paper.",
        [Question("Write a summary of the text above.", ("Abstract.",))],
    ),
    "govreport": (
        [{"report": "Report.", "summary": "Short."}], "Report.", [Question("Write a summary of the report above.", ("Short.",))]
    ),
    "financebench": (
        [{"doc_name": "A_2020", "question": "a?", "answer": "1", "evidence": [{"evidence_text_full_page": "Page 1."}]},
         {"doc_name": "A_2020", "question": "b?", "answer": "2", "evidence": [{"evidence_text_full_page": "Page 1."},
                                                                              {"evidence_text_full_page": "Page 2."}]}],
        "Page 1.\n\nPage 2.", [Question("a?", ("1",)), Question("b?", ("2",))],
    ),
    "finqa": (
        [{"id": "f", "pre_text": ["Before."], "table": [["year", "2020"], ["cash", "3"]], "post_text": ["After."],
          "question": "a?", "answer": "3", "final_result": "3"}],
        "Before.\nyear | 2020\ncash | 3\nAfter.", [Question("a?", ("3",))],
    ),
    "hotpotqa": (
        [{"id": "h", "question": "a?", "answer": "b", "context": {"title": ["X", "Y"], "sentences": [["One.", " Two."], ["Three."]]}}],
        "X\nOne. Two.\n\nY\nThree.", [Question("a?", ("b",))],
    ),
    "structure": (
        [{"text": "# One\ntext\n## Two\n"}], "# One",
        [Question("List the headings of the text above, in order, one a line.", ("One\nTwo",))],
    ),
    "documents": (
        [{"id": "d", "text": "Text.", "questions": [{"question": "a?", "answer": "b"}]}], "Text.", [Question("a?", ("b",))]
    ),
}  # fmt: skip


def _file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_every_task_has_rows_here() -> None:
    assert set(ROWS) == set(TASKS)


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_documents(name: str, tmp_path: Path) -> None:
    rows, text, questions = ROWS[name]
    (document,) = load_task(name, _file(tmp_path, rows))
    assert document.text.startswith(text) and list(document.questions) == questions


@pytest.mark.parametrize("name", set(ROWS) - {"documents"})
def test_a_file_in_our_own_form_stands_in_for_any_source(name: str, tmp_path: Path) -> None:
    rows, text, questions = ROWS["documents"]
    (document,) = load_task(name, _file(tmp_path, rows))
    assert (document.text, list(document.questions)) == (text, questions)


def test_bad_files_are_one_clear_line(tmp_path: Path) -> None:
    path = _file(tmp_path, [{"id": "d", "text": "Text.", "questions": [{"question": "a?"}]}])
    with pytest.raises(ValueError, match=r"rows.jsonl has no question with a gold answer"):
        load_task("qasper", path)
    with pytest.raises(ValueError, match=r"rows.jsonl has not the form of qasper: KeyError 'full_text'"):
        load_task("qasper", _file(tmp_path, [{"text": "Text."}]))
    path.write_text('{"id": 1}\n{broken', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        load_task("documents", path)
    with pytest.raises(ValueError, match="d has no `text`"):
        load_task("documents", _file(tmp_path, [{"id": "d", "questions": [{"question": "a?", "answer": "b"}]}]))
    with pytest.raises(ValueError, match="The task 'trivia' is unknown; there are: longhealth"):
        load_task("trivia")


def test_a_hub_out_of_reach_is_one_clear_line() -> None:
    with pytest.raises(OSError, match=r"emozilla/quality could not be loaded .*: give a local file"):
        load_task("quality")


def test_needles_are_in_the_text_once_and_the_text_has_its_length() -> None:
    document = make_needles(300, 5, seed=1)
    assert 300 <= len(document.text.split()) < 320
    assert len({question.answers for question in document.questions}) == 5
    for question in document.questions:
        key = question.question.removesuffix("?").split()[-1]
        assert document.text.count(f"The secret number of the {key} is {question.answers[0]}.") == 1
    assert make_needles(300, 5, seed=1) == document != make_needles(300, 5, seed=2)
    with pytest.raises(ValueError, match="too few for 5 needles"):
        make_needles(10, 5)


def test_documents_together_and_questions_of_others() -> None:
    one, two = make_needles(100, 2, seed=1), make_needles(100, 3, seed=2)
    both = join_documents([one, two])
    assert both.text == f"{one.text}\n\n{two.text}" and both.questions == one.questions + two.questions
    others = unanswerable_from([one, two], one)
    assert [q.question for q in others] == [q.question for q in two.questions] and not any(q.answers for q in others)


def test_general_files(tmp_path: Path) -> None:
    assert general_pairs(_file(tmp_path, [{"id": 1, "prompt": "a", "answer": "b"}])) == [{"prompt": "a", "answer": "b"}]
    mmlu = _file(tmp_path, [{"question": "a?", "choices": ["x", "y"], "answer": 1}])
    assert general_choices(mmlu) == [Question("a?", ("y",), ("x", "y"), 1)]
    rules = [{"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}]
    assert instruction_rows(_file(tmp_path, rows=rules)) == rules
    with pytest.raises(ValueError, match="row 1 lacks answer"):
        general_pairs(_file(tmp_path, [{"prompt": "a"}]))
