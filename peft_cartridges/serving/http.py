"""Questions to a server with OpenAI's API, without a client library.

`huggingface_hub.InferenceClient` would do, but refuses any server where `HF_HUB_OFFLINE` is set.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any


def get_json(url: str, key: str | None = None, *, timeout: float = 30) -> Any:
    """What `url` (http or https) answers, as JSON.

    Raises:
        ValueError: `url` is no http(s) address, or the answer is no JSON.
        OSError: the server cannot be reached, or answers with an error.
    """
    with _open(url, key, None, timeout) as answer:
        return json.loads(answer.read())


def stream_chat(url: str, key: str | None, body: dict[str, Any], *, timeout: float = 600) -> Iterator[str]:
    """The answer to `body`, a request to `{url}/chat/completions`, in the pieces that the server sends.

    Raises:
        ValueError, OSError: as `get_json`; the message is the server's.
    """
    with _open(f"{url}/chat/completions", key, {**body, "stream": True}, timeout) as answer:
        for line in answer:
            field, _, data = line.decode().strip().partition(":")
            if field != "data" or data.strip() == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise OSError(_message(chunk))
            if chunk.get("choices") and (piece := chunk["choices"][0].get("delta", {}).get("content")):
                yield piece


def _open(url: str, key: str | None, body: Any, timeout: float) -> Any:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url!r} is no address of a server: it begins with http:// or https://.")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        try:
            message = _message(json.loads(error.read()))
        except ValueError:
            message = str(error)
        raise OSError(message) from error
    except urllib.error.URLError as error:
        raise OSError(f"{url}: {error.reason}") from error


def _message(answer: Any) -> str:
    """Of an error, as servers write it: vLLM's, and FastAPI's."""
    error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)
