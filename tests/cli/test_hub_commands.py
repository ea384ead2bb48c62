"""`cartridges push`, `pull`, `list` and `compose`, as typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peft_cartridges.adapter_folder import read_config
from peft_cartridges.cli import main
from tests.hub.conftest import hub, impatient  # noqa: F401
from tests.hub.local_hub import LocalHub
from tests.test_adapter_folder import WEIGHTS, edit_config, saved


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = saved(tmp_path / "source")
    edit_config(folder, base_model_name_or_path="org/base")
    return folder


def test_push_list_pull_and_compose(
    hub: LocalHub,  # noqa: F811
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["push", str(folder), "user/a", "--dry-run"]) == 0
    assert "Would push to user/a" in capsys.readouterr().out and hub.requests == []
    assert main(["push", str(folder), "user/a", "--private", "--branch", "v2", "--message", "first"]) == 0
    shown = capsys.readouterr().out
    assert "Pushed to user/a at v2 (private)" in shown and f"{hub.url}/user/a/commit/" in shown
    assert WEIGHTS in hub.files("user/a", "v2")
    assert main(["push", str(folder), "user/a"]) == 0
    assert main(["list", "--base-model", "org/base"]) == 0
    shown = capsys.readouterr().out
    assert "user/a " in shown and "org/base" in shown
    assert main(["list", "--search", "nothing"]) == 0
    assert capsys.readouterr().out == "No cartridges found.\n"
    assert main(["pull", "user/a", "--revision", "v2", "--output-dir", str(tmp_path / "pulled")]) == 0
    assert f"user/a: 10 tokens for org/base\n{tmp_path / 'pulled'}\n" == capsys.readouterr().out
    both = str(tmp_path / "both")
    assert main(["compose", "user/a", str(tmp_path / "pulled"), "--output-dir", both, "--sinks", "all"]) == 0
    assert f"20 tokens of 2 cartridges are in {both}" in capsys.readouterr().out
    assert read_config(both).num_tokens == 20


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["push", "nowhere", "user/a"], "There is no folder 'nowhere'"),
        (["pull", "user/missing"], "There is no `user/missing`"),
        (["pull", "not a name"], "neither a folder nor a name on the Hub"),
        (["compose", "user/missing", "user/a", "--output-dir", "x"], "There is no `user/missing`"),
    ],
)
def test_errors_are_one_line_and_status_1(
    argv: list[str],
    message: str,
    hub: LocalHub,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"cartridges {argv[0]}: error: ") and message in error and error.count("\n") == 1


def test_no_network_is_one_line(
    hub: LocalHub,  # noqa: F811
    impatient: None,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.close()
    assert main(["list"]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert main(["pull", "user/a"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["push", "pull", "list", "compose"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and f"usage: cartridges {command}" in capsys.readouterr().out


def test_the_settings_of_a_real_process_are_the_hub_s(hub: LocalHub, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Nothing patched: HF_ENDPOINT, HF_TOKEN and HF_HOME, as a user sets them."""
    environment = {
        "PATH": "/usr/bin:/bin", "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writer", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    program = (
        "import sys; from peft_cartridges.cli import main\n"
        "for line in sys.argv[1:]: assert main(line.split()) == 0, line"
    )
    lines = [f"push {folder} user/real", "list --search real", f"pull user/real --output-dir {tmp_path / 'pulled'}"]
    done = subprocess.run(
        [sys.executable, "-c", program, *lines], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert read_config(tmp_path / "pulled").num_tokens == 10
    assert "hf_writer" not in done.stdout + done.stderr
