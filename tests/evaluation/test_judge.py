"""The judge, against a server that speaks the protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from peft_cartridges.evaluation import Judge

pytest.importorskip("openai")


class _Handler(BaseHTTPRequestHandler):
    """Says yes where the graded answer has the word "blue"."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)  # type: ignore[attr-defined]
        graded = request["messages"][0]["content"].split("Answer to grade:")[1].split("\n")[0]
        verdict = "I think so: Yes." if "blue" in graded else "No"
        body: dict[str, Any] = {
            "id": "1", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": verdict}}
            ],
        }  # fmt: skip
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    server.requests = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_last_yes_or_no_counts(server: HTTPServer) -> None:
    judge = Judge(f"http://127.0.0.1:{server.server_port}/v1", "grader")
    golds = [["blue"], ["blue", "green"], ["blue"]]
    assert judge(["what color ?"] * 3, ["it is blue", "red", ""], golds) == [1.0, 0.0, 0.0]
    prompts = [request["messages"][0]["content"] for request in server.requests]  # type: ignore[attr-defined]
    assert any("blue | green" in prompt for prompt in prompts)


def test_a_server_that_is_not_there_is_an_os_error() -> None:
    judge = Judge("http://127.0.0.1:9/v1", "grader")
    judge._client = judge._client.with_options(max_retries=0)
    with pytest.raises(OSError, match=r"The judge at http://127\.0\.0\.1:9/v1/ failed"):
        judge(["?"], ["a"], [["a"]])
