"""A server's gate, in front of an application that says what it was asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from peft_cartridges import Gate
from peft_cartridges.serving.access import CURRENT, Tenant
from peft_cartridges.serving.base_model import BaseModelFacts
from peft_cartridges.serving.catalog import Catalog, Limits
from peft_cartridges.serving.gating import GateMiddleware
from peft_cartridges.serving.store import CartridgeStore
from tests.serving.models import SHAPES, save_base, save_cartridge
from tests.tiny_models import tiny_model, tiny_tokenizer

SHIPS = "The keeper of the lighthouse counts ships. Ships pass the lighthouse at night."
ABOUT, OTHER = "Who counts the ships at the lighthouse?", "Write a haiku in Spanish."


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    folder = tmp_path_factory.mktemp("gating")
    save_base(folder / "base")
    catalog = Catalog(CartridgeStore(folder / "store"), BaseModelFacts(str(folder / "base")), Limits(200))
    for seed, name in enumerate(("gated", "other", "open")):
        save_cartridge(folder / name, tiny_model("llama", **SHAPES["llama"]), 20 + seed, seed=seed)
        if name != "open":
            text = SHIPS if name == "gated" else "Paolo bakes bread in the bakery of Mill Lane, and sells bread."
            Gate.make(text, tiny_tokenizer()).save_pretrained(folder / name)
        catalog.load(name, str(folder / name))
    return catalog


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    event = await receive()
    length = dict(scope["headers"]).get(b"content-length")
    assert length == str(len(event["body"])).encode() and not event["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"own", b"1")]})
    await send({"type": "http.response.body", "body": event["body"]})


def ask(
    catalog: Catalog,
    body: Any,
    path: str = "/v1/chat/completions",
    method: str = "POST",
    pieces: int = 1,
    **headers: str,
) -> tuple[Any, str | None, list[tuple[str, str]]]:
    """What the application behind the gate was asked, the response's header, and what was counted."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = -(-len(raw) // pieces)
    events = [
        {"type": "http.request", "body": raw[i * size : (i + 1) * size], "more_body": i + 1 < pieces}
        for i in range(pieces)
    ]
    counted: list[tuple[str, str]] = []
    sent: list[Any] = []

    async def receive() -> Any:
        return events.pop(0)

    async def send(event: Any) -> None:
        sent.append(event)

    gate = GateMiddleware(_echo, catalog, "base", lambda entry, decision: counted.append((entry.name, decision)))
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": [*given, (b"content-length", b"%d" % len(raw))]}
    asyncio.run(gate(scope, receive, send))
    found = dict(sent[0]["headers"])
    assert found[b"own"] == b"1"
    answer = sent[1]["body"]
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(answer)
    decision = found.get(b"x-cartridge-gate")
    return answer, None if decision is None else decision.decode(), counted


def chat(model: Any, text: Any, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


@pytest.mark.parametrize(
    ("model", "text", "decision"),
    [
        ("gated", ABOUT, "accepted"),
        ("gated", OTHER, "rejected"),
        ("gated+other", "Who bakes bread in the bakery?", "accepted"),
        ("gated+other", OTHER, "rejected"),
        ("gated+open", OTHER, None),  # the part without a gate takes all
        ("open", OTHER, None),
        ("base", OTHER, None),
        ("missing", OTHER, None),
    ],
)
def test_what_is_rejected_goes_to_the_base(catalog: Catalog, model: str, text: str, decision: str | None) -> None:
    body = chat(model, text, temperature=0.5, stream=True)
    asked, told, counted = ask(catalog, body)
    assert told == decision and counted == ([(model, decision)] if decision else [])
    assert asked == {**body, "model": "base" if decision == "rejected" else model}


def test_every_endpoint_that_asks_in_words(catalog: Catalog) -> None:
    for path, fields in {
        "/v1/completions": {"prompt": OTHER},
        "/v1/responses": {"input": OTHER},
        "/v1/messages": {"messages": [{"role": "user", "content": [{"type": "text", "text": OTHER}]}]},
    }.items():
        assert ask(catalog, {"model": "gated", **fields}, path)[1] == "rejected", path
    parts = [{"role": "user", "content": [{"type": "input_text", "text": ABOUT}]}]
    assert ask(catalog, {"model": "gated", "input": parts}, "/v1/responses")[1] == "accepted"
    assert ask(catalog, {"model": "gated", "prompt": [OTHER, ABOUT]}, "/v1/completions")[1] == "accepted"
    assert ask(catalog, {"model": "gated", "prompt": [OTHER, OTHER]}, "/v1/completions")[1] == "rejected"
    for tokens in ([5, 6], [[5, 6], [7]]):  # no words to judge by
        assert ask(catalog, {"model": "gated", "prompt": tokens}, "/v1/completions")[1] is None
    assert ask(catalog, chat("gated", OTHER), "/tokenize")[1] is None
    assert ask(catalog, chat("gated", OTHER), method="GET")[1] is None


def test_a_client_may_turn_it_off_and_bodies_come_in_pieces(catalog: Catalog) -> None:
    asked, told, _ = ask(catalog, chat("gated", OTHER), x_cartridge_gate="off")
    assert (asked["model"], told) == ("gated", None)
    asked, told, _ = ask(catalog, chat("gated", OTHER), pieces=3)
    assert (asked["model"], told) == ("base", "rejected")


def test_what_is_no_request_is_left_to_the_server(catalog: Catalog) -> None:
    for body in (b"no JSON", b"[1]", b'{"model": ["gated"]}', b'{"messages": []}', b"null", b"[" * 5000):
        assert ask(catalog, body)[1] is None
    for broken in ([], [1], "", None, [{"role": "system", "content": "x"}]):
        body = {"model": "gated", "messages": broken}
        asked, told, _ = ask(catalog, body)
        assert asked == body and told in (None, "rejected"), broken


def test_a_tenant_hears_of_its_own_cartridges_only(catalog: Catalog) -> None:
    token = CURRENT.set(Tenant("acme", frozenset({"other"})))
    try:
        asked, told, _ = ask(catalog, chat("gated", OTHER))
    finally:
        CURRENT.reset(token)
    assert (asked["model"], told) == ("gated", None)  # the server says that there is none


def test_the_catalog_tells_and_counts(catalog: Catalog, tmp_path: Path) -> None:
    before = {one["id"]: one["gate"] for one in (entry.describe() for entry in catalog.entries())}
    assert before["open"] is None
    ask(catalog, chat("other", OTHER))
    after = {entry.name: entry.describe()["gate"] for entry in catalog.entries()}
    assert after["other"] == {**before["other"], "rejected": before["other"]["rejected"] + 1}
    folder = save_cartridge(tmp_path / "damaged", tiny_model("llama", **SHAPES["llama"]), 9, seed=9)
    (folder / "gate.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"gate\.safetensors is damaged"):
        catalog.load("damaged", str(folder))
