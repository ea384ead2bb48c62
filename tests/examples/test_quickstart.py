"""The quickstart, for real: a small run on SmolLM2-135M and a text that it cannot know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="SmolLM2-135M-Instruct is not there: run `make model`")
def test_a_small_run_beats_no_context(tmp_path: Path) -> None:
    command = [sys.executable, "examples/quickstart.py", "--fast", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "quickstart.json").read_text())
    none, cartridge, full = (row["nll"] for row in results["rows"])
    # Where training begins, with the text's first tokens for a cartridge, a quarter of the gap is closed.
    assert full < cartridge < none - 0.3 * (none - full)
    assert results["gap_closed"] == pytest.approx((none - cartridge) / (none - full))
    assert results["stock_peft_difference"] < 1e-3
    assert (tmp_path / "adapter_model.safetensors").is_file()
