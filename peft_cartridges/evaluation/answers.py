"""Generated answers, and how near they come to the gold ones."""

from __future__ import annotations

import collections
import importlib
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..hidden_states import pad_right
from ..kv_prefix import evaluating
from .system import System


@torch.no_grad()
def generate_answers(
    system: System, questions: Sequence[str], *, max_new_tokens: int = 48, batch_size: int = 16
) -> list[list[int]]:
    """Greedy answers, as token ids without the end-of-turn token."""
    codec = system.codec
    prompts = [system.preamble + codec.encode_prompt([question]) for question in questions]
    ends = codec.end_ids
    if system.engine is not None:
        return system.engine.generate(prompts, max_new_tokens, ends)
    pad = codec.tokenizer.pad_token_id if codec.tokenizer.pad_token_id is not None else min(ends)
    answers: list[list[int]] = [[]] * len(questions)
    for indices, context in system.parts(questions):
        order = sorted(indices, key=lambda i: len(prompts[i]))
        with context as model, evaluating(model):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                inputs = _left_padded([prompts[i] for i in batch], pad, next(model.parameters()).device)
                found: Any = model.generate(  # type: ignore[operator]
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=sorted(ends),
                    pad_token_id=pad,
                )
                for index, row in zip(batch, found[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                    end = next((place for place, token in enumerate(row) if token in ends), len(row))
                    answers[index] = row[:end]
    return answers


def _left_padded(rows: Sequence[list[int]], pad: int, device: Any) -> dict[str, Any]:
    ids = pad_right([row[::-1] for row in rows], pad).flip(1)
    mask = pad_right([[1] * len(row) for row in rows]).flip(1)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: SQuAD's rule (arXiv 1606.05250)."""
    text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 where the normalized answer is one of the normalized gold answers, else 0."""
    return float(normalize(answer) in {normalize(gold) for gold in golds})


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words, against the nearest gold answer (SQuAD's)."""
    return max(_f1(normalize(answer).split(), normalize(gold).split()) for gold in golds)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def rouge_l(answer: str, golds: Sequence[str]) -> float:
    """ROUGE-L's F measure with stemming, against the nearest gold answer, by `rouge-score`.

    Raises:
        ImportError: `rouge-score` is not installed.
    """
    scorer = _needed("rouge_score.rouge_scorer", "rouge-score", "ROUGE").RougeScorer(["rougeL"], use_stemmer=True)
    return max(scorer.score(gold, answer)["rougeL"].fmeasure for gold in golds)


def chrf(answer: str, golds: Sequence[str]) -> float:
    """chrF (0 to 1) against the nearest gold answer, by `sacrebleu`.

    Raises:
        ImportError: `sacrebleu` is not installed.
    """
    return _needed("sacrebleu", "sacrebleu", "chrF").sentence_chrf(answer, list(golds)).score / 100


ANSWER_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "chrf": chrf,
}


def _needed(module: str, package: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package `{package}`: pip install 'peft-cartridges[eval]', or leave it out of "
            "`answer_metrics`."
        ) from error
