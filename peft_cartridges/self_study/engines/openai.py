"""Generation by any server that speaks OpenAI's completions protocol: vLLM, SGLang and others."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...chat import ChatCodec, get_tokenizer
from ...conversations.targets import top_k_of_tables
from .engine import Engine, EngineError, Generation, Outcome, Request

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_REACHED_WITHIN = 3.0
# By name, because versions of `openai` take theirs from different packages (httpx, httpx2).
_NOBODY = ("ConnectError", "ConnectTimeout", "UnsupportedProtocol", "InvalidURL")
_ID = "token_id:"
# Refusals of the server as a whole; others may be of one request.
_NEVER = (401, 403, 404, 405)


class OpenAIEngine(Engine):
    """A server, over HTTP: `POST {base_url}/completions` with token ids as prompt.

    Requests run in threads of their own that nobody waits for, so that a server that hangs holds up neither the others
    nor Ctrl-C. One that fails for a reason that may pass (no connection, a time-out, status 408, 409, 425, 429 or 5xx,
    an answer that is no completion) comes back to be given to whoever is free; the server is then left alone for a
    while (twice as long each time, up to 30 s, or as it says), and tried with one request. After `max_retries` tries
    without an answer it counts as hopeless.

    Args:
        base_url: For instance `http://localhost:8000/v1`.
        model: The model's name at the server.
        processing_class: Tokenizer or processor of that model.
        api_key: Of the server; by default `OPENAI_API_KEY`, or none.
        top_k: Log-probabilities to ask for per position; 0 for none, which spares much of the traffic.
        max_length: Tokens that fit into the model's window, if you want chunks checked beforehand.
        concurrency: Requests that are under way at a time.
        max_retries: How often an ill server is tried again.
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
            raise ValueError("The engine `openai` needs `openai`: pip install 'peft-cartridges[openai]'.") from None
        if concurrency < 1 or max_retries < 0:
            raise ValueError(
                f"`concurrency` ({concurrency}) must be at least 1 and `max_retries` ({max_retries}) not negative."
            )
        self._openai = openai
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=0)
        self._tokens = ServerTokens(processing_class)
        self.model_name, self.base_url = model, base_url
        self.max_length = max_length
        self.end_ids = ChatCodec.of(None, processing_class).end_ids
        self.k, self.gives_top_k = top_k, top_k > 0
        self.concurrency, self.max_retries = concurrency, max_retries
        self.token_ids, self.text_prompts = token_ids, text_prompts
        self.retries = 0  # requests that came back so far, for reports and tests
        self._todo: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Request, float, Generation | _Trouble]] = queue.SimpleQueue()
        self._under_way = self._answered = 0
        self._failures, self._failed_at, self._tried_again_at = 0, 0.0, 0.0

    def unreachable(self) -> str | None:
        """Whether nobody is there. A server that is slow, or busy loading, or knows no `/models`, is one that is there."""
        try:
            self._client.with_options(timeout=_REACHED_WITHIN).models.list()
        except self._openai.APIConnectionError as error:
            if type(error.__cause__).__name__ in _NOBODY:
                return f"the server at {self.base_url} cannot be reached ({_shorten(str(error.__cause__))})"
        except Exception:  # whatever else it says, it is there
            return None
        return None

    @contextlib.contextmanager
    def running(self, wake: threading.Event) -> Iterator[None]:
        self._todo, self._done = queue.SimpleQueue(), queue.SimpleQueue()
        self._under_way = self._failures = 0
        self._tried_again_at, self.hopeless = 0.0, None
        for _ in range(self.concurrency):
            threading.Thread(target=self._work, args=(self._todo, self._done, wake), daemon=True).start()
        try:
            yield
        finally:
            for _ in range(self.concurrency):
                self._todo.put(None)  # who hangs never sees it, and ends with the process

    def room(self) -> int:
        if not self._failures:
            return self.concurrency - self._under_way
        return 1 if not self._under_way and time.monotonic() >= self._tried_again_at else 0

    def begin(self, requests: Sequence[Request]) -> None:
        self._under_way += len(requests)
        for request in requests:
            self._todo.put(request)

    def step(self) -> list[Outcome]:
        outcomes = []
        while not self._done.empty():
            request, began, result = self._done.get()
            self._under_way -= 1
            if isinstance(result, Generation):
                self._failures, self.hopeless = 0, None
                self._answered += 1
                outcomes.append(Outcome(request, result))
            elif result.refused and self._answered:
                outcomes.append(Outcome(request, None, refused=True))  # it answers others: it is this request's fault
            else:
                self._fail(result, began)
                outcomes.append(Outcome(request, None))
        return outcomes

    def _fail(self, trouble: _Trouble, began: float) -> None:
        self.retries += 1
        if trouble.forever or trouble.refused:
            self.hopeless = trouble.message
            self._failures, self._tried_again_at = 1, float("inf")
            return
        # Requests that were under way together fail together: that is one failure.
        if began >= self._failed_at:
            self._failures += 1
            wait = min(_FIRST_WAIT * 2 ** (self._failures - 1), _LONGEST_WAIT) * (0.75 + random.random() / 2)
            self._failed_at = time.monotonic()
            self._tried_again_at = self._failed_at + (wait if trouble.wait is None else trouble.wait)
        if self._failures > self.max_retries:
            self.hopeless = f"The server at {self.base_url} gave {trouble.message}, {self._failures} times in a row."

    def _work(self, waiting: Any, done: Any, wake: threading.Event) -> None:
        while (request := waiting.get()) is not None:
            began = time.monotonic()
            try:
                result: Generation | _Trouble = self._ask(request)
            except _Trouble as trouble:
                result = trouble
            except Exception as error:  # whatever else a strange answer leads to
                result = _Trouble(f"an answer that cannot be read ({_shorten(repr(error))})")
            done.put((request, began, result))
            wake.set()

    def _ask(self, request: Request) -> Generation:
        """Raises:
        _Trouble: no answer that can be used.
        """
        prompt: Any = [*request.context, *request.prompt]
        options: dict[str, Any] = {"max_tokens": request.max_new_tokens, "temperature": request.temperature}
        if request.scored:
            options["echo"] = True
        else:
            options["seed"] = request.seed & 0x7FFFFFFF  # 31 bits: what servers of every kind take
        try:
            answer = self._client.completions.with_raw_response.create(
                model=self.model_name,
                prompt=self._tokens.text(prompt) if self.text_prompts else prompt,
                logprobs=self.k if self.gives_top_k else 1,
                extra_body={"return_tokens_as_token_ids": True} if self.token_ids else {},
                **options,
            )
            # Not through the client's types: of an echo of a long chunk the last few positions are looked at.
            choice = _first_choice(json.loads(answer.text if isinstance(answer.text, str) else answer.text()))
        except self._openai.APIStatusError as error:
            problem = f"status {error.status_code}: {_shorten(error.message)}"
            if error.status_code not in (408, 409, 425, 429) and error.status_code < 500:
                message = f"The server at {self.base_url} refused a request ({problem})."
                raise _Trouble(message, refused=True, forever=error.status_code in _NEVER) from error
            raise _Trouble(problem, wait=_seconds(error.response.headers.get("retry-after"))) from error
        except self._openai.APIConnectionError as error:  # time-outs too
            raise _Trouble(f"no answer ({_shorten(str(error.__cause__ or error))})") from error
        except (self._openai.APIError, _Garbage, ValueError, TypeError) as error:
            raise _Trouble(f"an answer that is no completion ({_shorten(str(error))})") from error
        return self._read_echo(request, choice) if request.scored else self._read(request, choice)

    def _read(self, request: Request, choice: Mapping[str, Any]) -> Generation:
        ids, tables = self._positions(choice, 0)
        if not 1 <= len(ids) <= request.max_new_tokens:
            raise _Trouble(
                f"an answer that is no completion ({len(ids)} tokens where 1 to {request.max_new_tokens} were wanted)"
            )
        top_k = top_k_of_tables(tables, self.k) if self.gives_top_k else None
        return Generation(ids, top_k, choice.get("finish_reason") == "stop")

    def _read_echo(self, request: Request, choice: Mapping[str, Any]) -> Generation:
        length, number = len(request.context) + len(request.prompt), request.scored
        have = len((choice.get("logprobs") or {}).get("tokens") or [])
        if not length <= have <= length + 1:
            raise _Trouble(f"an answer that is no completion (an echo of {have} tokens where {length} were sent)")
        ids, tables = self._positions(choice, length - number)
        if ids[:number] != list(request.prompt[-number:]):
            message = (
                f"The server at {self.base_url} reads a text as other tokens than `processing_class`: is it the "
                f"tokenizer of {self.model_name}?"
            )
            raise _Trouble(message, forever=True)
        return Generation([], top_k_of_tables(tables[:number], self.k))

    def _positions(self, choice: Mapping[str, Any], first: int) -> tuple[list[int], list[dict[int, float]]]:
        """Token ids and `{token id: log-probability}` of the positions of a choice from `first` on."""
        logprobs = choice.get("logprobs") or {}
        tokens, tables = logprobs.get("tokens"), logprobs.get("top_logprobs")
        if not tokens or not tables or len(tokens) != len(tables) or not all(isinstance(t, str) for t in tokens):
            raise _Trouble("an answer that is no completion (no log-probabilities of tokens in it)")
        ids = [self._tokens.look_up(token) for token in tokens[first:]]
        if None in ids:
            message = (
                f"The server at {self.base_url} gave the token {tokens[first + ids.index(None)]!r}, which "
                "`processing_class` cannot tell: use the model's tokenizer, and a server that gives token ids "
                "(`server_token_ids=True`)."
            )
            raise _Trouble(message, forever=True)
        known = [
            {
                found: float(value)
                for token, value in (table or {}).items()
                if (found := self._tokens.look_up(token)) is not None
            }
            for table in tables[first:]
        ]
        return [token for token in ids if token is not None], known


class ServerTokens:
    """Looks up tokens that come as `token_id:123`, as the vocabulary writes them, or as their text.

    A text that stands for several tokens (single bytes of a character all read the same) is known as none.
    """

    def __init__(self, processing_class: Any) -> None:
        self.tokenizer = get_tokenizer(processing_class)
        self._texts: dict[str, int | None] | None = None

    def look_up(self, token: str) -> int | None:
        """The id of a server's token; `None` if it cannot be told."""
        if token.startswith(_ID):
            number = token[len(_ID) :]
            return int(number) if number.isdigit() else None
        if self._texts is None:
            self._texts = self._make_texts()
        return self._texts.get(token)

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _make_texts(self) -> dict[str, int | None]:
        vocabulary = self.tokenizer.get_vocab()
        found: dict[str, int | None] = {}
        for token, index in vocabulary.items():
            text = self.tokenizer.convert_tokens_to_string([token])
            found[text] = None if text in found else index
        # Written as in the vocabulary, a token is never ambiguous.
        return {**{token: index for token, index in vocabulary.items() if token not in found}, **found}


class _Garbage(Exception):
    """An answer that is not what was asked for."""


class _Trouble(Exception):
    """Why a request was not answered.

    Args:
        message: For people.
        refused: Whether the server refused this request.
        forever: Whether it would refuse any.
        wait: Seconds that the server asks to be left alone for.
    """

    def __init__(
        self, message: str, *, refused: bool = False, forever: bool = False, wait: float | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.refused, self.forever, self.wait = message, refused, forever, wait


def _first_choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
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


__all__ = ["EngineError", "OpenAIEngine", "ServerTokens"]
