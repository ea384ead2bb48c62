"""An optional judge: a model behind any OpenAI-compatible server says whether an answer is right."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_PROMPT = """\
Question: {question}
Reference answers: {golds}
Answer to grade: {answer}

Does the answer to grade agree with a reference answer in what the question asks for? Reply with one word, yes or no."""


class Judge:
    """Grades answers against the gold ones.

    Args:
        base_url: Of the server, e.g. `http://localhost:8000/v1`.
        model: Its name there.
        api_key: By default the environment's `OPENAI_API_KEY`, or none.
        concurrency: Requests at a time.

    Raises:
        ImportError: the package `openai` is not installed.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None, concurrency: int = 8) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ImportError("A judge needs the package `openai`: pip install 'peft-cartridges[openai]'.") from error
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client: Any = OpenAI(base_url=base_url, api_key=key, max_retries=4)
        self.model = model
        self.concurrency = concurrency

    def __call__(self, questions: Sequence[str], answers: Sequence[str], golds: Sequence[Sequence[str]]) -> list[float]:
        """1 for each answer that is judged right, else 0.

        Raises:
            OSError: the server cannot be reached or refuses.
        """
        from openai import OpenAIError

        try:
            with ThreadPoolExecutor(self.concurrency) as pool:
                return list(pool.map(self._grade, questions, answers, golds))
        except OpenAIError as error:
            raise OSError(f"The judge at {self._client.base_url} failed: {error}") from error

    def _grade(self, question: str, answer: str, golds: Sequence[str]) -> float:
        prompt = _PROMPT.format(question=question, golds=" | ".join(golds), answer=answer or "(nothing)")
        reply = self._client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=64
        )
        verdicts = re.findall(r"\b(yes|no)\b", (reply.choices[0].message.content or "").lower())
        return float(bool(verdicts) and verdicts[-1] == "yes")
