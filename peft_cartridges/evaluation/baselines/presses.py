"""The presses of NVIDIA's kvpress, as that library itself computes them, in an environment of its own: its pins
(transformers < 5.3 in kvpress 0.5.5) exclude the versions of this package."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ...kv_prefix import KVPrefix
from ..system import NotApplicable, System, bare
from .bench import Bench

_WORKER = Path(__file__).with_name("press_worker.py")

# Name -> (class in kvpress, its options)
PRESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "kvzip": ("KVzipPress", {}),
    "snapkv": ("SnapKVPress", {}),
    "pyramidkv": ("PyramidKVPress", {}),
    "streaming_llm": ("StreamingLLMPress", {}),
    "tova": ("TOVAPress", {}),
    "expected_attention": ("ExpectedAttentionPress", {}),
    "adakv": ("AdaKVPress", {"press": "ExpectedAttentionPress"}),
    "knorm": ("KnormPress", {}),
    "keydiff": ("KeyDiffPress", {}),
    "lagkv": ("LagKVPress", {}),
    "compactor": ("CompactorPress", {}),
    "duo_attention": ("DuoAttentionPress", {"on_the_fly_scoring": True}),
    "restorekv": ("RestoreKVPress", {}),
}

_INSTALL = (
    "no environment with kvpress is given: python -m venv kvpress-env && kvpress-env/bin/pip install kvpress, then "
    "--kvpress-python kvpress-env/bin/python"
)


class KvpressEngine:
    """A process that reads a text with a press and then answers for rows behind it.

    Args:
        python: The interpreter of an environment with kvpress.
        settings: What the worker reads first: `model`, `dtype`, `press`, `options`, `ratio`, `context_ids`.

    Raises:
        NotApplicable: kvpress refuses the model or fails; the message is its last line.
    """

    def __init__(self, python: str, settings: dict[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvpress-")
        self._errors = open(Path(self._folder.name) / "stderr", "w+", encoding="utf-8")  # noqa: SIM115 - lives as long
        try:
            self._process = subprocess.Popen(
                [python, "-I", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
        except OSError as error:
            raise NotApplicable(f"{python} does not run: {error}") from error
        weakref.finalize(self, _stop, self._process, self._folder, self._errors)
        self.kept: float = self._ask(settings)["kept"]

    def states(self, rows: Sequence[list[int]], lengths: Sequence[int]) -> list[Tensor]:
        """As `predicting_states`."""
        file = str(Path(self._folder.name) / "states.safetensors")
        self._ask({"op": "states", "rows": list(rows), "lengths": list(lengths), "file": file})
        tensors = load_file(file)
        return [tensors[str(number)] for number in range(len(rows))]

    def generate(self, rows: Sequence[list[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
        """Greedy answers without the token that ended them."""
        request = {"op": "generate", "rows": list(rows), "max_new_tokens": max_new_tokens, "ends": sorted(ends)}
        found: list[list[int]] = self._ask(request)["ids"]
        return found

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = [text for text in self._errors.read().splitlines() if text.strip()] or ["no message"]
            raise NotApplicable(f"kvpress: {last[-1][:200]}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def pressed(name: str, bench: Bench) -> System:
    """The text's cache, compressed by a press of kvpress to as many tokens as the cartridge has, question unseen. How
    many tokens it really keeps (heads and layers may differ) stands in the system's `num_tokens`.

    Raises:
        NotApplicable: there is no environment with kvpress, the text does not fit, or the press refuses the model.
    """
    if bench.kvpress_python is None:
        raise NotApplicable(_INSTALL)
    bench.check_window()
    start = time.perf_counter()
    kind, options = PRESSES[name]
    with bare(bench.model) as model:
        config: Any = model.config
        one = KVPrefix.from_input_ids(model, bench.text_ids[:1])
    settings = {
        "model": config._name_or_path,
        "dtype": str(next(bench.model.parameters()).dtype).removeprefix("torch."),
        "device": str(next(bench.model.parameters()).device),
        "press": kind,
        "options": options,
        "ratio": 1 - bench.num_tokens / len(bench.text_ids),
        "context_ids": bench.text_ids,
    }
    engine = KvpressEngine(bench.kvpress_python, settings)
    return System(
        f"kvpress: {kind.removesuffix('Press')}", bench.model, bench.codec, engine=engine,
        num_tokens=round(engine.kept), kv_bytes=round(one.nbytes * engine.kept), seconds=time.perf_counter() - start,
        note="seconds include loading the model in its own process",
    )  # fmt: skip


def _stop(process: Any, folder: Any, errors: Any) -> None:
    with process:
        process.kill()
    errors.close()
    folder.cleanup()
