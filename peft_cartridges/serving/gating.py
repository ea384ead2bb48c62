"""The gate in front of an engine: requests to a cartridge that are not about its text go to the base model.

Gates read words only, so this stands in front of any engine, before a request is put into tokens, and needs no model.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from ..gate import Request, any_accepts
from .access import allowed_names
from .catalog import Catalog, Entry

# Of a response: what the gate decided. In a request, `off` asks for the cartridge whatever the gate says.
HEADER = b"x-cartridge-gate"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


class GateMiddleware:
    """ASGI: where the gate of the cartridge that a request names rejects it, the request names the base model instead.

    Args:
        app: The server behind it.
        catalog: Its cartridges.
        base_name: What requests call the base model.
        count: Told of each decision.
    """

    def __init__(
        self, app: Any, catalog: Catalog, base_name: str, count: Callable[[Entry, str], None] | None = None
    ) -> None:
        self.app, self.catalog, self.base_name, self.count = app, catalog, base_name, count

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in PATHS:
            await self.app(scope, receive, send)
            return
        parts, event = [], await receive()
        while event["type"] == "http.request":
            parts.append(event.get("body", b""))
            if not event.get("more_body", False):
                break
            event = await receive()
        if event["type"] != "http.request":  # the client has gone
            return
        body = b"".join(parts)
        headers = dict(scope["headers"])
        decision = None
        if headers.get(HEADER, b"").lower() != b"off":
            body, decision = self._decide(body)
        lengths = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*lengths, (b"content-length", str(len(body)).encode())]}
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def read() -> Any:
            return waiting.pop() if waiting else await receive()

        async def tell(event: Any) -> None:
            if decision is not None and event["type"] == "http.response.start":
                event = {**event, "headers": [*event.get("headers", ()), (HEADER, decision.encode())]}
            await send(event)

        await self.app(scope, read, tell)

    def _decide(self, body: bytes) -> tuple[bytes, str | None]:
        """The body as it goes on, and what was decided; what is no sound request is left to the server."""
        try:
            request = json.loads(body)
            name = request["model"]
            entry = self.catalog.find(name, allowed_names())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return body, None
        decision = None if entry is None else decide(entry, requests_of(request))
        if entry is None or decision is None:
            return body, None
        if self.count is not None:
            self.count(entry, decision)
        return (json.dumps({**request, "model": self.base_name}).encode() if decision == "rejected" else body), decision


def decide(entry: Entry, asked: Sequence[Request]) -> str | None:
    """What a cartridge's gate says of a request in one or several texts, of which any may be about the cartridge's:
    `accepted` or `rejected`, which is counted; None where there is no gate, or no text."""
    if not entry.gates or not asked:
        return None
    decision = "accepted" if any(any_accepts(entry.gates, one) for one in asked) else "rejected"
    entry.decisions[decision] += 1
    return decision


def requests_of(body: Mapping[str, Any]) -> list[Request]:
    """What a request to one of `PATHS` asks, as far as it is text: a conversation, or texts, of which any may be about the
    cartridge's; none where that cannot be told (token ids)."""
    given = body.get("messages", body.get("input", body.get("prompt")))
    if isinstance(given, str):
        return [given] if given else []
    if not isinstance(given, list) or not given:
        return []
    if all(isinstance(one, str) for one in given):
        return list(given)
    messages = [one for one in given if isinstance(one, dict)]
    return [messages] if len(messages) == len(given) and any(one.get("role") == "user" for one in messages) else []
