"""The real huggingface_hub client against `LocalHub`, with a cache and a token of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http
from transformers.utils import hub as transformers_hub

from tests.hub.local_hub import LocalHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A local Hub that the client takes for the real one, and is logged in to as `user`.

    huggingface_hub reads its settings when it is imported; the copies of them that it uses are set here.
    """
    server = LocalHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
    _http.close_session()
    yield server
    _http.close_session()
    server.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits before it tries again; the tests do not."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
