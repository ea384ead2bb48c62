"""The scripts of `examples/tuner`, one for each thing that the tuner does, run as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"
SCRIPTS = sorted((ROOT / "examples" / "tuner").glob("*.py"))


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="SmolLM2-135M-Instruct is not there: run `make model`")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_runs(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
