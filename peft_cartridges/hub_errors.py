"""Errors of the Hub in one line that says what to do. Nothing of a request, and so no token, is in the message."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_LOG_IN = "log in with `hf auth login`, or pass a token that may see it"


class HubError(OSError):
    """The Hub has no such thing, refuses it, or cannot be reached."""


@contextlib.contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns what huggingface_hub raises about `repo_id` into a `HubError` of one line (`ValueError` for a name that
    cannot be one)."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is neither a folder nor a name on the Hub (`user/name`).") from error
    except HubError:
        raise
    except Exception as error:
        message = _explain(_root_cause(error), repo_id, revision)
        if message is None:
            raise
        raise HubError(message) from error


def is_network_error(error: BaseException) -> bool:
    """Whether the Hub could not be talked to. huggingface_hub 1 does that with httpx, 2 with httpx2."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")


def _root_cause(error: BaseException) -> BaseException:
    """huggingface_hub wraps what went wrong into a `LocalEntryNotFoundError` or a `RuntimeError`."""
    while error.__cause__ is not None and isinstance(error, (LocalEntryNotFoundError, RuntimeError)):
        error = error.__cause__
    return error


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    if isinstance(error, GatedRepoError):
        return f"`{repo_id}` is gated: ask for access at {constants.ENDPOINT}/{repo_id}, then {_LOG_IN}."
    if isinstance(error, RepositoryNotFoundError):
        return f"There is no `{repo_id}` at {constants.ENDPOINT}: check the name; if it is private, {_LOG_IN}."
    if isinstance(error, RevisionNotFoundError):
        return f"`{repo_id}` has no revision `{revision}`: name a branch, a tag or a commit of it."
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        at = f" at revision `{revision}`" if revision else ""
        return (
            f"`{repo_id}` is not in the cache{at}, and the Hub may not or cannot be asked: go online (without "
            "HF_HUB_OFFLINE) and fetch it once."
        )
    if isinstance(error, EntryNotFoundError):
        return f"`{repo_id}` lacks a file that was asked for: it may have changed meanwhile, try again."
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error.response.status_code, repo_id)
    if is_network_error(error):
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}): check the network and try again."
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return f"A file of `{repo_id}` arrived with another size than it should have: try again."
    return None


def _explain_status(status: int, repo_id: str) -> str:
    if status == 401:
        return f"The Hub does not accept the token for `{repo_id}`: {_LOG_IN}."
    if status == 403:
        return f"The token may not do this to `{repo_id}`: use one with write access to it, or another name."
    if status == 429:
        return (
            "The Hub asks for fewer requests (429): wait some minutes and try again; with a token the limit is higher."
        )
    if status >= 500:
        return f"The Hub has trouble of its own ({status}) with `{repo_id}`: try again later."
    return f"The Hub refuses the request about `{repo_id}` ({status})."
