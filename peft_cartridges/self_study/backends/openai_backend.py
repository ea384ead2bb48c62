"""Generation by any server that speaks OpenAI's completions protocol: vLLM, SGLang and others."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

from ..teacher_targets import Targets, top_k_of_tables
from .base import BackendError, Generation
from .engine_backend import EngineBackend
from .server_tokens import ServerTokens

T = TypeVar("T")

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds


class OpenAIBackend(EngineBackend):
    """A server's model as teacher, over HTTP: `POST {base_url}/completions` with token ids as prompt and log-probs.

    A request that fails for a reason that may pass (no connection, a time-out, status 408, 409, 425, 429 or 5xx, an
    answer that is no completion) is sent again, with waits that double up to 30 s or as the server says. One that fails
    for another reason, or too often, ends the run; finished chunks are kept, and the same command carries on.

    Args:
        base_url: For instance `http://localhost:8000/v1`.
        model: The model's name at the server.
        processing_class: Tokenizer or processor of that model.
        api_key: Of the server; by default `OPENAI_API_KEY`, or none.
        top_k: Log-probabilities to ask for per position.
        max_length: Tokens that fit into the model's window, if you want chunks checked beforehand.
        concurrency: Requests that are under way at a time.
        max_retries: How often a request is sent again.
        timeout: Seconds to wait for an answer.
        token_ids: Whether to ask for token ids instead of token texts (vLLM's `return_tokens_as_token_ids`). Servers
            that refuse unknown fields need `False`; token texts are then looked up in the tokenizer.
        text_prompts: Send prompts as text, to servers that take no token ids. Their tokenizer must then read them as
            they were written, special tokens included and none added.

    Raises:
        ValueError: `openai` is not installed, or a number is out of range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        processing_class: Any,
        *,
        api_key: str | None = None,
        top_k: int = 20,
        max_length: int | None = None,
        concurrency: int = 16,
        max_retries: int = 6,
        timeout: float = 300.0,
        token_ids: bool = True,
        text_prompts: bool = False,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise ValueError("`OpenAIBackend` needs `openai`: pip install 'peft-cartridges[openai]'.") from None
        if concurrency < 1 or max_retries < 0:
            raise ValueError(
                f"`concurrency` ({concurrency}) must be at least 1 and `max_retries` ({max_retries}) not negative."
            )
        super().__init__(model, processing_class, top_k=top_k, max_length=max_length)
        self._openai = openai
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=0)
        self._tokens = ServerTokens(processing_class)
        self.base_url = base_url
        self.concurrency = concurrency
        self.max_retries = max_retries
        self.token_ids = token_ids
        self.text_prompts = text_prompts
        self._given_up = threading.Event()
        self._failure: BackendError | None = None  # the first, of requests that run in parallel
        self.retries = 0  # so far, for reports and tests

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        """As `ContextSession.generate`."""

        def one(prompt: Sequence[int], seed: int) -> Generation:
            def read(choice: Any) -> Generation:
                ids, tables = self._positions(choice)
                if len(ids) > max_new_tokens or not ids:
                    raise _Garbage(f"{len(ids)} tokens where 1 to {max_new_tokens} were wanted")
                return Generation(ids, top_k_of_tables(tables, self.k), choice.finish_reason == "stop")

            # 31 bits: what servers of every kind take
            options = {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed & 0x7FFFFFFF}
            return self._ask(prompt, read, **options)

        return self._in_parallel(one, prompts, seeds)

    def targets(self, rows: Sequence[Sequence[int]], num_predicted: Sequence[int]) -> list[Targets]:
        """As `ContextSession.targets`, by an echo of each row."""

        def one(row: Sequence[int], number: int) -> Targets:
            def read(choice: Any) -> Targets:
                ids, tables = self._positions(choice)
                length = len(self.context) + len(row)
                if not length <= len(ids) <= length + 1:
                    raise _Garbage(f"an echo of {len(ids)} tokens where {length} were sent")
                if ids[length - number : length] != list(row[-number:]):
                    raise BackendError(
                        f"The server at {self.base_url} reads a text as other tokens than `processing_class`: is it the "
                        f"tokenizer of {self.model_name}?"
                    )
                return top_k_of_tables(tables[length - number : length], self.k)

            return self._ask(row, read, max_tokens=1, temperature=0.0, echo=True)

        return self._in_parallel(one, rows, num_predicted)

    def _in_parallel(
        self, function: Callable[[Sequence[int], int], T], rows: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> list[T]:
        self._given_up.clear()
        self._failure = None
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(function, row, number) for row, number in zip(rows, numbers, strict=True)]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._given_up.set()  # the others neither begin nor wait for another try
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _ask(self, row: Sequence[int], read: Callable[[Any], T], **options: Any) -> T:
        """One request, sent again as long as there is hope; `read` turns its first choice into the result."""
        prompt: Any = [*self.context, *row]
        if self.text_prompts:
            prompt = self._tokens.text(prompt)
        extra = {"return_tokens_as_token_ids": True} if self.token_ids else {}
        problem = ""
        for attempt in range(self.max_retries + 1):
            if self._given_up.is_set():
                raise self._failure or BackendError("Another request failed for good.")
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * (0.75 + random.random() / 2)
            try:
                answer = self._client.completions.create(
                    model=self.model_name, prompt=prompt, logprobs=self.k, extra_body=extra, **options
                )
                return read(_first_choice(answer))
            except self._openai.APIStatusError as error:
                problem = f"status {error.status_code}: {_shorten(error.message)}"
                if error.status_code not in (408, 409, 425, 429) and error.status_code < 500:
                    raise self._give_up(f"The server at {self.base_url} refused a request ({problem}).") from error
                wait = _seconds(error.response.headers.get("retry-after")) or wait
            except self._openai.APIConnectionError as error:  # time-outs too
                problem = f"no answer ({_shorten(str(error.__cause__ or error))})"
            except (self._openai.APIError, _Garbage, ValueError, TypeError) as error:
                problem = f"an answer that is no completion ({_shorten(str(error))})"
            if attempt < self.max_retries:
                self.retries += 1
                self._given_up.wait(wait)
        raise self._give_up(
            f"The server at {self.base_url} gave {problem}, {self.max_retries + 1} times in a row. Finished chunks are "
            "kept in `output_dir`: run the same command again once the server is well."
        )

    def _give_up(self, message: str) -> BackendError:
        self._failure = self._failure or BackendError(message)
        self._given_up.set()
        return self._failure

    def _positions(self, choice: Any) -> tuple[list[int], list[dict[int, float]]]:
        """Token ids and `{token id: log-probability}` of each position of a choice."""
        logprobs = getattr(choice, "logprobs", None)
        tokens, tables = getattr(logprobs, "tokens", None), getattr(logprobs, "top_logprobs", None)
        if not tokens or not tables or len(tokens) != len(tables) or not all(isinstance(t, str) for t in tokens):
            raise _Garbage("no log-probabilities of tokens in it")
        ids = [self._tokens.look_up(token) for token in tokens]
        if None in ids:
            raise BackendError(
                f"The server at {self.base_url} gave the token {tokens[ids.index(None)]!r}, which `processing_class` "
                "cannot tell: use the model's tokenizer, and a server that gives token ids (`token_ids=True`)."
            )
        known = [
            {
                found: float(value)
                for token, value in (table or {}).items()
                if (found := self._tokens.look_up(token)) is not None
            }
            for table in tables
        ]
        return [token for token in ids if token is not None], known


class _Garbage(Exception):
    """An answer that is not what was asked for."""


def _first_choice(answer: Any) -> Any:
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise _Garbage(f"{type(answer).__name__} without choices")
    return choices[0]


def _seconds(retry_after: str | None) -> float | None:
    """What the server asks to wait, if it is a number and not beyond all bounds."""
    try:
        return min(max(float(retry_after or ""), 0.0), 10 * _LONGEST_WAIT)
    except ValueError:
        return None


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) < 200 else f"{text[:200]}…"
