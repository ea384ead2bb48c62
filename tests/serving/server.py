"""`cartridges serve` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
_MAIN = "from peft_cartridges.cli import main; raise SystemExit(main())"


class Server:
    """Starts with the given arguments, and is there when it answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; the message has the end of its log.
    """

    def __init__(self, arguments: Sequence[str], log: Path, *, seconds: float = 300, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        command = [sys.executable, "-c", _MAIN, "serve", *arguments, "--host", "127.0.0.1", "--port", str(self.port)]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                cwd=log.parent,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", **environment},
            )
        end = time.monotonic() + seconds
        while not self.is_alive():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError("The server did not start:\n" + log.read_text(errors="replace")[-4000:])
            time.sleep(0.5)

    def is_alive(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """As `kill -9`, for it and every process that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """Asks it to stop, and gives its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        finally:
            self.kill()
