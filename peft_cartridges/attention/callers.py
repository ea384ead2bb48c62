"""Who opens a context: a function, or a generator, which runs now for one caller and then for another."""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_NOT_CALLERS = (__name__, f"{__package__}.contexts", "contextlib")


def thread_and_task() -> tuple[int, Any]:
    try:
        return threading.get_ident(), asyncio.current_task()
    except RuntimeError:  # no event loop
        return threading.get_ident(), None


def frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def generator_that_opens() -> FrameType | None:
    """The frame of the generator whose `with` this is, if it is one's. Functions under `contextlib.contextmanager` are
    generators too, but open a context for their caller."""
    for frame in frames():
        if frame.f_globals.get("__name__") in _NOT_CALLERS:
            continue
        is_generator = bool(frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR))
        if is_generator and frame.f_back is not None and frame.f_back.f_globals.get("__name__") == "contextlib":
            continue
        return frame if is_generator else None
    return None
