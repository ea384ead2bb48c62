"""Who may ask a server for what: keys, tenants and the cartridges that each may name."""

from __future__ import annotations

import contextvars
import hashlib
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Paths that anyone may ask: they say that the server lives, and how it fares.
OPEN_PATHS = ("/health", "/ping", "/metrics")
_MAX_FILE_BYTES = 16 << 20


@dataclass(frozen=True)
class Tenant:
    """A group of clients.

    Args:
        name: Also tells its blocks in the engine's cache from those of others.
        cartridges: The names that it may use; None for all.
        is_admin: Whether it may load and unload cartridges.
    """

    name: str
    cartridges: frozenset[str] | None = None
    is_admin: bool = False


# Of the request that is being answered; None where the server knows no tenants.
CURRENT: contextvars.ContextVar[Tenant | None] = contextvars.ContextVar("tenant", default=None)


def allowed_names() -> Collection[str] | None:
    """What the client of this request may name; None for everything."""
    tenant = CURRENT.get()
    return None if tenant is None else tenant.cartridges


class Keys:
    """API keys, kept as their hashes.

    Args:
        tenants: From the SHA-256 of a key, in hexadecimal digits, to its tenant.
        open: Whether requests without a key are answered, as a tenant that is no admin.
    """

    def __init__(self, tenants: Mapping[str, Tenant], *, open: bool) -> None:
        self._tenants, self.open = dict(tenants), open

    @classmethod
    def from_settings(
        cls, *, api_keys: Collection[str] = (), tenants_file: str | Path | None = None, admin_key: str | None = None
    ) -> Keys:
        """Keys of clients that may name everything, the tenants of a file (see `read_tenants`), and an admin's.

        Raises:
            ValueError: the file is damaged, or one key stands for two.
        """
        pairs = [(_hash(key), Tenant("")) for key in api_keys]
        pairs += read_tenants(tenants_file) if tenants_file is not None else []
        if admin_key is not None:
            pairs.append((_hash(admin_key), Tenant("", is_admin=True)))
        tenants = dict(pairs)
        if len(tenants) < len(pairs):
            raise ValueError("One API key stands for two tenants: give each its own.")
        return cls(tenants, open=not api_keys and tenants_file is None)

    def find(self, authorization: str | None) -> Tenant | None:
        """The tenant of an `Authorization` header, or None."""
        scheme, _, key = (authorization or "").partition(" ")
        asked, found = _hash(key.strip()), None
        if scheme.lower() == "bearer":
            for known, tenant in self._tenants.items():  # all of them, so that the time says nothing
                if secrets.compare_digest(asked, known):
                    found = tenant
        return found or (Tenant("") if self.open else None)


def read_tenants(path: str | Path) -> list[tuple[str, Tenant]]:
    """Tenants from a JSON file: `{"acme": {"api_key_sha256": "…", "cartridges": ["handbook"]}}`. `api_key` instead
    of its hash, and `"cartridges": "*"` for all, are understood too.

    Raises:
        ValueError: the file is none of that; the message says where.
    """
    if Path(path).stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_FILE_BYTES:,} bytes: it is no list of tenants.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f'{path} must be an object of tenants: {{"acme": {{"api_key_sha256": …, "cartridges": […]}}}}.'
        )
    found = []
    for name, fields in content.items():
        fields = fields if isinstance(fields, dict) else {}
        if unknown := sorted(set(fields) - {"api_key", "api_key_sha256", "cartridges"}):
            raise ValueError(f"{path}: tenant {name!r} has unknown fields: {', '.join(unknown)}.")
        key, digest, names = (fields.get(field) for field in ("api_key", "api_key_sha256", "cartridges"))
        if (key is None) == (digest is None) or not isinstance(key or digest, str):
            raise ValueError(f"{path}: tenant {name!r} needs either `api_key_sha256` or `api_key`, a text.")
        if digest is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise ValueError(f"{path}: `api_key_sha256` of tenant {name!r} is no SHA-256 in hexadecimal digits.")
        if names != "*" and not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
            raise ValueError(f'{path}: `cartridges` of tenant {name!r} must be a list of names, or "*".')
        allowed = None if names == "*" else frozenset(names)
        found.append((digest.lower() if digest else _hash(str(key)), Tenant(name, allowed)))
    return found


class AccessMiddleware:
    """ASGI: answers 401 to who has no key, and sets `CURRENT` for the others."""

    def __init__(self, app: Any, keys: Keys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] not in ("http", "websocket") or path in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        tenant = self.keys.find(headers.get(b"authorization"))
        if tenant is None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            body = error_body("An API key is needed: `Authorization: Bearer …`.", 401, "AuthenticationError")
            start = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": start})
            await send({"type": "http.response.body", "body": json.dumps(body).encode()})
            return
        token = CURRENT.set(tenant)
        try:
            await self.app(scope, receive, send)
        finally:
            CURRENT.reset(token)


def error_body(message: str, status: int, kind: str = "BadRequestError") -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
