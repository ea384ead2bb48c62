"""`cartridges chat`: its commands, and answers of a model here and on a server."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_cartridges import Gate
from peft_cartridges.cli.chat import Chat, LocalEngine, Message, ServerEngine
from tests.serving.models import SHAPES, save_base, save_cartridge
from tests.tiny_models import tiny_model, tiny_tokenizer

STEPS = 6
QUESTION = "what is the sea ?"


class Echo:
    """Says what it was asked, and behind what."""

    def __init__(self) -> None:
        self.names = ["a", "b"]

    def answer(self, messages: list[Message], cartridge: str | None) -> Iterator[str]:
        if messages[-1]["content"] == "fail":
            raise ValueError("it failed")
        yield f"{cartridge}:"
        yield "|".join(message["content"] for message in messages)

    def accepts(self, messages: list[Message], cartridge: str) -> bool:
        return "general" not in messages[-1]["content"]

    def size(self, cartridge: str) -> tuple[int, int]:
        return {"a": (10, 1 << 20), "b": (20, 2 << 20)}[cartridge]


def talk(engine: Any, *lines: str, corpus: str | None = None) -> tuple[Chat, str]:
    said: list[str] = []
    asked = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    def write(text: str, end: str = "\n", flush: bool = False) -> None:
        said.append(text + end)

    chat = Chat(engine, corpus)
    chat.talk(read, write)
    return chat, "".join(said)


def test_turns_and_commands() -> None:
    chat, said = talk(Echo(), "one", "two", "fail", "", "/cartridge b", "three", "/none", "four", "/reset", "five")
    for part in ("a:one\n", "a:one|a:one|two\n", "error: it failed", "b:three\n", "None:four\n", "None:five\n"):
        assert part in said, part
    assert "cartridge a: 10 tokens, 1.0 MiB" in said and "first after" in said
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    _, said = talk(Echo(), "/cartridge c", "/cartridge a+b", "x", "/what", "/quit", "never")
    assert "no cartridge 'c'. There are: a, b." in said and "a+b:x" in said and "a+b: 30 tokens, 3.0 MiB" in said
    assert "no command /what" in said and "never" not in said


def test_what_the_gate_rejects_is_answered_without_the_cartridge() -> None:
    chat, said = talk(Echo(), "one", "a general thing", "two", "/none", "a general thing")
    for part in ("a:one\n", "None:one|a:one|a general thing\n", "|two\n", "None:a general thing\n"):
        assert part in said, part
    assert said.count("[no cartridge: not about a, says its gate; ") == 1 and chat.cartridge is None


def test_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    chat, said = talk(Echo(), "/compare", "why", "then", corpus="the text")
    assert all(
        part in said
        for part in ("no context (", "cartridge a (", "full text (", "None:why", "a:why", "None:the text|why")
    )
    assert [message["content"] for message in chat.messages] == ["then", "a:then"]  # a comparison is no turn
    monkeypatch.setenv("COLUMNS", "40")
    _, said = talk(Echo(), "/compare why")
    assert "--- no context" in said and "full text" not in said


def settings(cartridges: list[str], **changes: Any) -> argparse.Namespace:
    options = {
        "cartridges": cartridges, "server": None, "api_key": None, "base_model": None, "max_new_tokens": STEPS,
        "temperature": 0.0, "gate": "auto",
    }  # fmt: skip
    return argparse.Namespace(**{**options, **changes})


def test_a_model_here_answers_as_peft_does(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base(base)
    folders = {}
    for name, length in {"a": 20, "b": 30}.items():
        model = tiny_model("llama", **SHAPES["llama"])
        folders[name] = save_cartridge(tmp_path / name, model, length, seed=length, base=str(base))
    engine = LocalEngine(settings([str(folders["a"]), f"other={folders['b']}"]))
    assert engine.names == ["a", "other"] and engine.size("a") == (20, 20 * 2 * 2 * 2 * 64 * 4)
    tokenizer, messages = tiny_tokenizer(), [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = {}
    for cartridge in (None, "a", "other", "a+other"):
        reference: Any = tiny_model("llama", **SHAPES["llama"])
        if cartridge:
            reference = PeftModel.from_pretrained(reference, folders["a"], adapter_name="a")
            reference.load_adapter(str(folders["b"]), "other")
            names = cartridge.split("+")
            reference.set_adapter(names if len(names) > 1 else names[0])
        with torch.no_grad():
            ids = reference.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found[cartridge] = "".join(engine.answer(messages, cartridge))
        assert found[cartridge] == tokenizer.decode(ids, skip_special_tokens=True), cartridge
    assert len({*found.values()}) == 4

    gate = Gate.make("what is the sea ? the sea , the sea .", tokenizer)
    gate.save_pretrained(folders["a"])
    sources, general = [str(folders["a"]), f"other={folders['b']}"], [{"role": "user", "content": "write a haiku now"}]
    assert gate(messages) == [True] and gate(general) == [False]
    engine = LocalEngine(settings(sources))
    for asked, cartridge, expected in (
        (messages, "a", True), (general, "a", False), (general, "other", True), (general, "a+other", True),
    ):  # fmt: skip
        assert engine.accepts(asked, cartridge) is expected
    assert LocalEngine(settings(sources, gate="off")).accepts(general, "a")


class _Server(BaseHTTPRequestHandler):
    """Just enough of a server: its models, and one answer in pieces."""

    def do_GET(self) -> None:
        data: Any = [{"id": "base"}, {"id": "a", "parent": "base"}]
        if self.path == "/v1/cartridges":
            data = [{"id": "a", "num_tokens": 7, "bytes": 1 << 20}]
        self._send("application/json", json.dumps({"data": data}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["messages"][-1]["content"] == "fail":
            self._send("application/json", b'{"error": {"message": "it failed"}}', 400)
            return
        text = f"{self.headers['Authorization']} {body['model']} {body['messages'][-1]['content']}"
        chunks = [{"choices": [{"index": 0, "delta": {"content": part}}], "id": "", "created": 0, "model": "", "system_fingerprint": ""} for part in text.split(" ")]  # fmt: skip
        lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self._send("text/event-stream", lines.encode())

    def _send(self, kind: str, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


def test_a_server_answers() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        engine = ServerEngine(settings(["a"], server=url + "/v1/", api_key="key"))
        assert engine.size("a") == (7, 1 << 20)
        messages = [{"role": "user", "content": "hello"}]
        assert list(engine.answer(messages, "a")) == ["Bearer", "key", "a", "hello"]
        assert list(engine.answer(messages, None))[2] == "base"
        with pytest.raises(OSError, match="it failed"):
            list(engine.answer([{"role": "user", "content": "fail"}], "a"))
        with pytest.raises(ValueError, match=r"has no model 'b'. It has: a, base"):
            ServerEngine(settings(["b"], server=url))
        with pytest.raises(ValueError, match="no address of a server"):
            ServerEngine(settings(["a"], server="file:///etc/passwd"))
    finally:
        server.shutdown()
        server.server_close()
