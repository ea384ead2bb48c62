"""One question to a server, without a client library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any


def get_json(url: str, key: str | None = None, *, timeout: float = 30) -> Any:
    """What `url` (http or https) answers, as JSON.

    Raises:
        ValueError: `url` is no http(s) address, or the answer is no JSON.
        OSError: the server cannot be reached, or answers with an error.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url!r} is no address of a server: it begins with http:// or https://.")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
            return json.loads(answer.read())
    except urllib.error.URLError as error:
        raise OSError(f"{url}: {getattr(error, 'reason', error)}") from error
