"""Keys and tenants: who may name what."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from peft_cartridges.serving.access import CURRENT, AccessMiddleware, Keys, Tenant, read_tenants


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "tenants.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_tenants_of_a_file(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"two").hexdigest()
    path = write(
        tmp_path,
        {
            "one": {"api_key": "one", "cartridges": ["a", "b"]},
            "two": {"api_key_sha256": digest.upper(), "cartridges": "*"},
        },
    )
    keys = Keys.from_settings(api_keys=["zero"], tenants_file=path, admin_key="admin")
    found = {key: keys.find(f"Bearer {key}") for key in ("zero", "one", "two", "admin", "other", "")}
    assert found["zero"] == Tenant("") and found["one"] == Tenant("one", frozenset("ab"))
    assert found["two"] == Tenant("two") and found["admin"] == Tenant("", is_admin=True)
    assert found["other"] is None and found[""] is None
    assert keys.find("Basic one") is None and keys.find(None) is None and keys.find("one") is None


def test_without_keys_everyone_may_ask_and_nobody_is_admin() -> None:
    keys = Keys.from_settings(admin_key="admin")
    assert keys.find(None) == keys.find("Bearer wrong") == Tenant("")
    assert keys.find("Bearer admin") == Tenant("", is_admin=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "must be an object"),
        ({}, "must be an object"),
        ({"a": "key"}, "needs either"),
        ({"a": {"cartridges": "*"}}, "needs either"),
        ({"a": {"api_key": "k", "api_key_sha256": "0" * 64, "cartridges": "*"}}, "needs either"),
        ({"a": {"api_key_sha256": "0" * 63, "cartridges": "*"}}, "no SHA-256"),
        ({"a": {"api_key": "k"}}, "must be a list of names"),
        ({"a": {"api_key": "k", "cartridges": [1]}}, "must be a list of names"),
        ({"a": {"api_key": "k", "cartridges": "*", "admin": True}}, "unknown fields: admin"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tenants(write(tmp_path, content))


def test_one_key_for_two_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {name: {"api_key": "same", "cartridges": "*"} for name in ("a", "b")})
    with pytest.raises(ValueError, match="stands for two tenants"):
        Keys.from_settings(tenants_file=path)


def test_the_tenant_is_that_of_the_request_and_of_no_other() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.01 * len(seen))
        seen.append((scope["path"], CURRENT.get()))

    keys = Keys({hashlib.sha256(name.encode()).hexdigest(): Tenant(name) for name in "ab"}, open=False)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def ask(path: str, key: str | None) -> None:
        headers = [] if key is None else [(b"Authorization", f"Bearer {key}".encode())]
        await AccessMiddleware(app, keys)({"type": "http", "path": path, "headers": headers}, None, send)

    async def all_at_once() -> None:
        await asyncio.gather(
            ask("/v1/1", "a"), ask("/v1/2", "b"), ask("/v1/3", "c"), ask("/v1/4", None), ask("/health", None)
        )

    asyncio.run(all_at_once())
    assert dict(seen) == {"/v1/1": Tenant("a"), "/v1/2": Tenant("b"), "/health": None}
    assert [message["status"] for message in sent if "status" in message] == [401, 401]
    assert CURRENT.get() is None
