"""A server on this machine that speaks OpenAI's completions protocol for a tiny model, and can be told to misbehave."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from tests.tiny_models import tiny_model, tiny_tokenizer

# What to do instead of answering the n-th request (from 0): a status, "garbage", "nothing" (an empty object), "cut" (an
# answer that breaks off), "hang up", or None to answer.
Trouble = Callable[[int], Any]


class CompletionsServer:
    """Serves `tiny_model()`.

    Args:
        trouble: See `Trouble`.
        token_ids: Whether it knows `return_tokens_as_token_ids`; if not it refuses the field, as strict servers do.
    """

    def __init__(self, trouble: Trouble = lambda number: None, *, token_ids: bool = True) -> None:
        self.model, self.tokenizer = tiny_model(), tiny_tokenizer()
        self.trouble, self.token_ids = trouble, token_ids
        self.requests = self.under_way = self.most_under_way = 0
        self.lock, self.computing = threading.Lock(), threading.Lock()
        self.prompts: list[Any] = []
        self.logprobs: list[int] = []

    @torch.no_grad()
    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        prompt = request["prompt"]
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        start, generator = len(ids), torch.Generator().manual_seed(request.get("seed", 0))
        finish = "length"
        for _ in range(request["max_tokens"]):
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            if request["temperature"] == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / request["temperature"]).softmax(-1), 1, generator=generator))
            ids.append(token)
            if token == self.tokenizer.eos_token_id:
                finish = "stop"
                break
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        first = 0 if request.get("echo") else start
        name = (lambda t: f"token_id:{t}") if request.get("return_tokens_as_token_ids") else self._text
        tables: list[Any] = []
        for position in range(first, len(ids)):
            if position == 0:
                tables.append(None)
                continue
            best = logprobs[position - 1].topk(request["logprobs"])
            wanted = {*best.indices.tolist(), ids[position]}
            tables.append({name(token): float(logprobs[position - 1, token]) for token in wanted})
        found = {"tokens": [name(token) for token in ids[first:]], "top_logprobs": tables}
        text = self.tokenizer.decode(ids[first:])
        return {
            "id": "x", "object": "text_completion", "created": 0, "model": request["model"],
            "choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": found}],
        }  # fmt: skip

    def _text(self, token: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Gives the base URL."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    number, outer.requests = outer.requests, outer.requests + 1
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                    outer.prompts.append(request["prompt"])
                    outer.logprobs.append(request["logprobs"])
                answer = self._answer(request, outer.trouble(number))
                with outer.lock:
                    outer.under_way -= 1
                if answer is not None:
                    self._send(*answer)

            def _answer(self, request: dict[str, Any], trouble: Any) -> tuple[int, bytes, int | None] | None:
                if trouble == "hang up":
                    self.close_connection = True
                    return None
                if isinstance(trouble, int):
                    return trouble, b'{"error": {"message": "out of luck"}}', None
                if trouble == "garbage":
                    return 200, b"<html>Bad gateway</html>", None
                if trouble == "nothing":
                    return 200, b"{}", None
                if not outer.token_ids and "return_tokens_as_token_ids" in request:
                    return 400, b'{"error": {"message": "unknown field return_tokens_as_token_ids"}}', None
                with outer.computing:
                    body = json.dumps(outer.complete(request)).encode()
                return 200, body, len(body) // 2 if trouble == "cut" else None

            def _send(self, status: int, body: bytes, cut: int | None) -> None:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                if status == 429:
                    self.send_header("retry-after", "0.01")
                self.end_headers()
                self.wfile.write(body[:cut])
                self.close_connection = cut is not None

            def log_message(self, *args: Any) -> None:
                pass

        return Handler
